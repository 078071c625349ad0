"""What data sets of picture files share: the size of images, and whether a split is held in memory or streamed."""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import replace
from typing import Annotated, Self

import torch

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.data.base import Dataset
from qadtr_brevitas.data.decode import read_images
from qadtr_brevitas.data.listing import Pictures
from qadtr_brevitas.data.picture import Decoding, size_of
from qadtr_brevitas.data.split import Split, balanced_indices
from qadtr_brevitas.data.streamed import StreamedSplit

logger = logging.getLogger(__name__)

SIZES_SAMPLED = 64
# Test images are read once in each pass and not again and again as in training, and every process of an evaluation
# would hold them: 50,000 at 224 pixels are 7.5 GB. The rule is theirs alone, because training images may be missing.
TEST_SHARE = 8
# Fewer bytes in memory are not worth a message.
_TOLD_FROM = 500_000_000


@plugin
class PictureSet(Dataset):
    """Pictures that are listed first and decoded later."""

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
    max_gb: Annotated[
        float,
        Field(
            gt=0,
            description=f"hold a training split in memory up to so many GB, a test split up to 1/{TEST_SHARE} of that; "
            "read larger ones as they are used",
        ),
    ] = 8.0
    stream: Annotated[
        bool | None,
        Field(description="read images whenever they are used; null: where they need more than max_gb says"),
    ] = None
    upright: Annotated[bool, Field(description="turn pictures as their EXIF tag says; torchvision and timm do not")] = (
        False
    )
    skip_damaged: Annotated[
        bool,
        Field(description="in training, use the next image of the class for one that cannot be read, and count them"),
    ] = False

    @abstractmethod
    def list_pictures(self, split: str) -> Pictures:
        """Return all pictures of one split.

        Raises:
            UsageError: the split has another name.
            DataError: they are missing.
        """

    def load(self, split: str, *, limit: int | None = None, seed: int = 0, progress: Progress | None = None) -> Split:
        """Read one split, uint8 (N, 3, H, W), or list it where it is to be streamed.

        Args:
            split: "train" or "test".
            limit: at most this many images, drawn by class as `Split.balanced` does; None for all. Others are not read.
            seed: seed of their choice.
            progress: called with the images done and the images in all.

        Raises:
            UsageError: the split has another name, or `crop` is set without `image_size`.
            DataError: a folder is missing or empty, an image cannot be read, or images differ in size and `image_size`
                is not set.
        """
        if self.crop is not None and self.image_size is None:
            raise UsageError(f"data.dataset.crop={self.crop:g} needs a size to crop to: set data.dataset.image_size")
        pictures, drawn_from = self.list_pictures(split), None
        if limit is not None and limit < len(pictures):
            drawn_from = len(pictures)
            chosen = balanced_indices(torch.tensor(pictures.labels), limit, seed=seed)
            pictures = pictures.pick(chosen.tolist(), part=f"{limit} by seed {seed}")
        crop, skip = self.crop or 1.0, self.skip_damaged and split == "train"
        decoding = Decoding.of(pictures, self.image_size, crop, upright=self.upright, skip_damaged=skip)
        if self._streams(pictures, decoding, split):
            return StreamedSplit(pictures, decoding, max_gb=self.max_gb, drawn_from=drawn_from)
        way = f"{self.image_size}/{crop}{'/upright' if self.upright else ''}"
        images = read_images(pictures, decoding, way=way, progress=progress)
        return Split(torch.from_numpy(images), torch.tensor(pictures.labels), pictures.classes, drawn_from)

    def needs_size(self) -> bool:
        """Return whether images have different sizes and are not resized.

        A sample from all over the training split is read, because reading every image would take long.

        Raises:
            DataError: a folder is missing or empty, or an image cannot be read.
        """
        if self.image_size is not None:
            return False
        pictures = self.list_pictures("train")
        sample = range(0, len(pictures), -(-len(pictures) // SIZES_SAMPLED))
        return len({size_of(pictures, index, upright=self.upright) for index in sample}) > 1

    def fitted(self, image_size: int, crop: float) -> Self:
        """Return this data set at a model's own size, and at its crop unless it has one.

        Args:
            image_size: height and width that the model was made for, in pixels.
            crop: timm's crop_pct of the model.
        """
        return replace(self, image_size=image_size, crop=crop if self.crop is None else self.crop)

    def with_whole_pictures(self) -> Self:
        """Return this data set with a training split that keeps whole pictures: streamed, unless that is forbidden."""
        return self if self.stream is not None or self.image_size is None else replace(self, stream=True)

    def _streams(self, pictures: Pictures, decoding: Decoding, split: str) -> bool:
        """Return whether a split is read from its files at each use, and say so, and why."""
        is_test = split != "train"
        limit = self.max_gb / TEST_SHARE if is_test else self.max_gb
        size = f"data.dataset.max_gb is {self.max_gb:g}{f', {limit:.3g} for test images' if is_test else ''}"
        height, width = decoding.size
        needed = len(pictures) * 3 * height * width
        what = f"{len(pictures):,} images of {height}x{width} ({needed / 1e9:.3g} GB in memory)"
        if self.stream or (self.stream is None and needed > limit * 1e9):
            why = "data.dataset.stream is on" if self.stream else size
            logger.info("%s are read from %s as they are used: %s", what, pictures.folder, why)
            return True
        if needed >= _TOLD_FROM:
            why = "data.dataset.stream is off" if self.stream is False else size
            logger.info("%s are held in memory: %s", what, why)
        return False
