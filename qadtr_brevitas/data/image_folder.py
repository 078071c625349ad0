"""Image folders of the layout ROOT/{train,test}/<class>/<image>, among them CIFAR-10."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from qadtr_brevitas.errors import DataError
from qadtr_brevitas.plugin import STRICT, Field, dataclass

if TYPE_CHECKING:
    from qadtr_brevitas.data.listing import Listing
    from qadtr_brevitas.data.split import Progress, Split


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ImageFolder:
    """Any images (png, jpg, jpeg, webp, bmp) laid out as ROOT/{train,test}/<class>/<image>; `val` also serves as test.

    Classes are numbered in the order of their names. A whole split is held in memory, one byte a value.
    """

    root: Annotated[str | None, Field(description="folder or tar; null: the folder that QADTR_BREVITAS_DATA names")] = (
        None
    )
    image_size: Annotated[
        int | None, Field(ge=8, description="resize and center-crop to this many pixels; null: they all have one size")
    ] = None
    max_gb: Annotated[float, Field(gt=0, description="refuse to hold more than this in memory, in GB")] = 8.0

    folder_name: ClassVar[str | None] = None

    def load(self, split: str, *, progress: Progress | None = None) -> Split:
        """Reads one split, uint8 (N, 3, H, W).

        Args:
            split: "train" or "test".
            progress: is told (images done, images in all).

        Raises:
            UsageError: another split.
            DataError: a missing or empty folder, an image that cannot be read, images of different sizes without
                `image_size`, or more than `max_gb` of them.
        """
        import torch

        from qadtr_brevitas.data.decode import read_images
        from qadtr_brevitas.data.listing import find_root, list_images
        from qadtr_brevitas.data.split import Split

        listing = list_images(find_root(self.root, name=self.folder_name), split)
        self.check(listing, split)
        images = read_images(listing, image_size=self.image_size, max_gb=self.max_gb, progress=progress)
        return Split(torch.from_numpy(images), torch.tensor(listing.labels), listing.classes)

    def check(self, listing: Listing, split: str) -> None:
        """Refuses a folder that is not what the data set says it is; any folder is an image folder.

        Raises:
            DataError: the files are not those of the data set.
        """


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Cifar10(ImageFolder):
    """CIFAR-10 (Krizhevsky 2009): 50,000 images for training and 10,000 for testing, 32x32, 10 classes.

    `root` is a folder that holds train and test, or one that holds `cifar10` or `cifar10.tar`, or the tar itself, which
    is unpacked once into the cache folder.
    """

    folder_name: ClassVar[str | None] = "cifar10"
    expected: ClassVar[dict[str, int]] = {"train": 50_000, "test": 10_000}
    class_count: ClassVar[int] = 10

    def check(self, listing: Listing, split: str) -> None:
        """Refuses other numbers of classes or images than CIFAR-10 has.

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
