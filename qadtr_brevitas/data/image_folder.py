"""Image folders of the layout ROOT/{train,test}/<class>/<image> or ROOT/<class>/<image>, and CIFAR-10 as one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Annotated, ClassVar, Self

from qadtr_brevitas.core.errors import DataError
from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.data.listing import DEFAULT_HOLDOUT, ClassOrder, Listing, find_root, list_images, needs_holdout
from qadtr_brevitas.data.picture_set import PictureSet


@plugin
class ImageFolder(PictureSet):
    """Any images (png, jpg, webp, tiff, ...) laid out as ROOT/{train,test}/<class>/<image>; `val` also serves as test.

    If ROOT has only one of these folders, or the class folders themselves, `holdout` divides the images; commands that
    need both splits set it to 5 themselves, and say so. Folders
    inside class folders belong to the class. Classes are numbered in the order of their names; where numbers or capital
    letters in them make torchvision's order differ from timm's, `class_order` is required.

    The images of a split are held in memory, one byte per value, where they fit into `max_gb`, test images where they
    fit into an eighth of it; others are read from their files whenever they are used.
    """

    holdout: Annotated[
        int | None, Field(ge=2, description="test on the first of every so many images, where there is one folder")
    ] = None
    class_order: Annotated[
        ClassOrder | None,
        Field(description="order of the classes: name (10 before 2) or natural (2 before 10); null: if they agree"),
    ] = None
    folder_name: ClassVar[str | None] = None

    def completed(self, needed: Collection[str]) -> tuple[Self, str | None]:
        """Return this data set with a holdout where its images lie in one place, and a sentence that says so."""
        # A named data set has both splits, or is not that data set.
        if self.holdout is not None or self.folder_name is not None:
            return self, None
        try:
            root = find_root(self.root)
        # Reading the images raises this error too, where it is expected.
        except DataError:
            return self, None
        if not needs_holdout(root, needed):
            return self, None
        return replace(self, holdout=DEFAULT_HOLDOUT), (
            f"{root} does not divide its images into train and test: every {DEFAULT_HOLDOUT}th image is kept for tests "
            f"and the others are for training and calibration (data.dataset.holdout={DEFAULT_HOLDOUT})"
        )

    def list_pictures(self, split: str) -> Listing:
        root = find_root(self.root, name=self.folder_name)
        listing = list_images(root, split, holdout=self.holdout, order=self.class_order)
        self.check(listing, split)
        return listing

    def check(self, listing: Listing, split: str) -> None:
        """Raise if the files are not those of the data set; every folder is a valid image folder.

        Raises:
            DataError: the files belong to another data set.
        """


@plugin
class Cifar10(ImageFolder):
    """CIFAR-10 (Krizhevsky 2009): 50,000 images for training and 10,000 for testing, 32x32, 10 classes.

    `root` is a folder that holds train and test, or one that holds `cifar10` or `cifar10.tar`, or the tar itself, which
    is unpacked once into the cache folder.
    """

    folder_name: ClassVar[str | None] = "cifar10"
    expected: ClassVar[dict[str, int]] = {"train": 50_000, "test": 10_000}
    class_count: ClassVar[int] = 10

    def check(self, listing: Listing, split: str) -> None:
        """Raise if there are other numbers of classes or images than CIFAR-10 has.

        Raises:
            DataError: the numbers differ.
        """
        found = (len(listing.classes), len(listing.paths))
        wanted = (self.class_count, self.expected[split])
        if found != wanted:
            raise DataError(
                f"{listing.folder} has {found[0]} classes and {found[1]} images, but CIFAR-10 has {wanted[0]} and "
                f"{wanted[1]}: fetch it again, or use the dataset image-folder"
            )
