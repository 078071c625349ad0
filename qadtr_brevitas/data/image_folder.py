"""Image folders of the layout ROOT/{train,test}/<class>/<image> or ROOT/<class>/<image>, and CIFAR-10 as one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Annotated, ClassVar

import torch

from qadtr_brevitas.core.errors import DataError, UsageError
from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.data.base import Dataset
from qadtr_brevitas.data.decode import read_images, size_of
from qadtr_brevitas.data.listing import DEFAULT_HOLDOUT, ClassOrder, Listing, find_root, list_images, needs_holdout
from qadtr_brevitas.data.split import Split, balanced_indices

SIZES_SAMPLED = 64


@plugin
class ImageFolder(Dataset):
    """Any images (png, jpg, webp, tiff, ...) laid out as ROOT/{train,test}/<class>/<image>; `val` also serves as test.

    If ROOT has only one of these folders, or the class folders themselves, `holdout` divides the images; commands that
    need both splits set it to 5 themselves, and say so. Folders
    inside class folders belong to the class. Classes are numbered in the order of their names; where numbers or capital
    letters in them make torchvision's order differ from timm's, `class_order` is required.

    The images of a split are held in memory, one byte per value.
    """

    root: Annotated[
        str | None, Field(description="folder, tar or zip; null: the folder that QADTR_BREVITAS_DATA names")
    ] = None
    image_size: Annotated[
        int | None,
        Field(
            ge=8, description="pixels after resizing; null: the size they have, or that of the model where it varies"
        ),
    ] = None
    crop: Annotated[
        float | None,
        Field(gt=0, le=1, description="resize the shorter side to image_size / crop, cut out the center; null: 1"),
    ] = None
    holdout: Annotated[
        int | None, Field(ge=2, description="test on the first of every so many images, where there is one folder")
    ] = None
    class_order: Annotated[
        ClassOrder | None,
        Field(description="order of the classes: name (10 before 2) or natural (2 before 10); null: if they agree"),
    ] = None
    max_gb: Annotated[float, Field(gt=0, description="refuse to hold more than this in memory, in GB")] = 8.0

    folder_name: ClassVar[str | None] = None

    def load(self, split: str, *, limit: int | None = None, seed: int = 0, progress: Progress | None = None) -> Split:
        """Read one split, uint8 (N, 3, H, W).

        Args:
            split: "train" or "test".
            limit: at most this many images, drawn by class as `Split.balanced` does; None for all. Others are not read.
            seed: seed of their choice.
            progress: called with the images done and the images in all.

        Raises:
            UsageError: the split has another name, or `crop` is set without `image_size`.
            DataError: a folder is missing or empty, an image cannot be read, images differ in size and `image_size` is
                not set, or the images need more than `max_gb`.
        """
        if self.crop is not None and self.image_size is None:
            raise UsageError(f"data.dataset.crop={self.crop:g} needs a size to crop to: set data.dataset.image_size")
        listing, drawn_from = self._list(split), None
        if limit is not None and limit < len(listing.paths):
            drawn_from = len(listing.paths)
            chosen = balanced_indices(torch.tensor(listing.labels), limit, seed=seed)
            listing = listing.pick(chosen.tolist(), part=f"{limit} by seed {seed}")
        images = read_images(
            listing, image_size=self.image_size, crop=self.crop or 1.0, max_gb=self.max_gb, progress=progress
        )
        return Split(torch.from_numpy(images), torch.tensor(listing.labels), listing.classes, drawn_from)

    def needs_size(self) -> bool:
        """Return whether images have different sizes and are not resized.

        A sample from all over the training split is read, because reading every image would take long.

        Raises:
            DataError: a folder is missing or empty, or an image cannot be read.
        """
        if self.image_size is not None:
            return False
        paths = self._list("train").paths
        return len({size_of(path) for path in paths[:: -(-len(paths) // SIZES_SAMPLED)]}) > 1

    def fitted(self, image_size: int, crop: float) -> ImageFolder:
        """Return this data set at a model's own size, and at its crop unless it has one.

        Args:
            image_size: height and width that the model was made for, in pixels.
            crop: timm's crop_pct of the model.
        """
        return replace(self, image_size=image_size, crop=crop if self.crop is None else self.crop)

    def completed(self, needed: Collection[str]) -> tuple[ImageFolder, str | None]:
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

    def _list(self, split: str) -> Listing:
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
