"""Decode one picture: to RGB of 8 bit, upright if wanted, resized and cropped as timm does for evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from math import floor
from typing import TypeAlias

import numpy
from PIL import Image, ImageOps, UnidentifiedImageError

from qadtr_brevitas.core.errors import DataError, QadtrError
from qadtr_brevitas.data.listing import Pictures

Pixels: TypeAlias = "numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.uint8]]"

# Pillow reads grays of 16 bit in these formats as 32 bit, some of them in earlier versions only.
_GRAYS_OF_16_BIT = ("PNG", "PPM")
# Pixels of a resized image: 0.6 GB on 8 threads.
LARGEST_RESIZED = 25_000_000


@dataclass(frozen=True)
class Decoding:
    """How pictures become images of one size.

    Args:
        size: height and width in pixels.
        shorter: what the shorter side is resized to (bicubic) before the center is cut out; None if all pictures have
            that size already.
        upright: whether pictures are turned as their EXIF tag says.
        skip_damaged: whether a picture that cannot be read is replaced by the next one of its class.
    """

    size: tuple[int, int]
    shorter: int | None = None
    upright: bool = False
    skip_damaged: bool = False

    @classmethod
    def of(
        cls, pictures: Pictures, image_size: int | None, crop: float, *, upright: bool, skip_damaged: bool
    ) -> Decoding:
        """Return the decoding to a size, or to that of the first picture where it is None.

        Args:
            pictures: at least one.
            image_size: height and width in pixels.
            crop: timm's crop_pct, in (0, 1].
            upright: as above.
            skip_damaged: as above.

        Raises:
            DataError: the first picture cannot be read.
        """
        if image_size:
            return cls((image_size, image_size), floor(image_size / crop), upright, skip_damaged)
        return cls(size_of(pictures, 0, upright=upright), None, upright, skip_damaged)

    def open(self, pictures: Pictures, index: int, *, report: Callable[[str], None]) -> Image.Image:
        """Return a whole picture, RGB.

        Args:
            pictures: where it is from.
            index: its index.
            report: called with what is wrong with a picture that is skipped.

        Raises:
            DataError: it cannot be read, or none of its class can.
        """
        try:
            return open_rgb(pictures, index, upright=self.upright)
        except DataError as error:
            if not self.skip_damaged:
                raise
            report(str(error))
        for other in _next_of_class(pictures, index):
            try:
                return open_rgb(pictures, other, upright=self.upright)
            except DataError:
                continue
        name = pictures.classes[pictures.labels[index]]
        raise DataError(f"no picture of the class {name!r} in {pictures.folder} can be read: fetch them again")

    def decode(self, pictures: Pictures, index: int, *, report: Callable[[str], None]) -> Pixels:
        """Return an image, uint8 (3, H, W).

        Raises:
            DataError: as in `open`, or the picture has another size, or is all but a line.
        """
        return self.fit(self.open(pictures, index, report=report), pictures.name(index))

    def fit(self, image: Image.Image, name: str) -> Pixels:
        """Return a picture resized and cropped, uint8 (3, H, W).

        Args:
            image: RGB.
            name: where it lies, for messages.

        Raises:
            DataError: it has another size and is not resized, or is all but a line.
        """
        height, width = self.size
        if self.shorter is not None:
            _check_shape(name, image, self.shorter)
            image = _center(_resize(image, self.shorter), height)
        if image.size != (width, height):
            raise DataError(
                f"{name} is {image.height}x{image.width}, but the first image is {height}x{width}: "
                "set data.dataset.image_size to resize all images to one size"
            )
        return numpy.asarray(image).transpose(2, 0, 1)


def open_rgb(pictures: Pictures, index: int, *, upright: bool = False) -> Image.Image:
    """Decode one picture to RGB of 8 bit; of 16 bit the upper 8 are kept, and transparency is left out.

    Raises:
        DataError: it cannot be read.
    """
    name = pictures.name(index)
    try:
        with Image.open(BytesIO(pictures.read(index))) as file:
            turned = ImageOps.exif_transpose(file) if upright else file
            return _eight_bit(name, file.format, turned).convert("RGB")
    except QadtrError:
        raise
    # Decoders raise whatever the libraries below them do, RuntimeError and struct.error among it.
    except Exception as error:
        raise _unreadable(name, error) from error


def size_of(pictures: Pictures, index: int, *, upright: bool = False) -> tuple[int, int]:
    """Return height and width of a picture without decoding it.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with Image.open(BytesIO(pictures.read(index))) as image:
            turned = upright and image.getexif().get(_ORIENTATION, 1) >= _FIRST_ON_ITS_SIDE
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception as error:
        raise _unreadable(pictures.name(index), error) from error


# The EXIF tag; values from 5 on exchange width and height.
_ORIENTATION, _FIRST_ON_ITS_SIDE = 0x0112, 5


def _next_of_class(pictures: Pictures, index: int) -> list[int]:
    alike = numpy.flatnonzero(numpy.asarray(pictures.labels) == pictures.labels[index])
    return [*alike[alike > index].tolist(), *alike[alike < index].tolist()]


def _unreadable(name: str, error: Exception) -> DataError:
    # Pillow's own text names the object that holds the bytes.
    reason = "no image of a known kind" if isinstance(error, UnidentifiedImageError) else error
    return DataError(f"cannot read the image {name} ({reason}): replace it or delete it")


def _eight_bit(name: str, kind: str | None, image: Image.Image) -> Image.Image:
    """Return the upper byte of 16-bit grays, which Pillow would clip to white; it does so with 16-bit colors itself."""
    if image.mode not in ("F", "I") and not image.mode.startswith("I;16"):
        return image
    if image.mode == "F" or (image.mode == "I" and kind not in _GRAYS_OF_16_BIT):
        raise DataError(f"{name} has grays of 32 bit, whose black and white are not known: save it with 8 or 16 bit")
    return Image.fromarray((numpy.asarray(image) >> 8).astype(numpy.uint8))


def _check_shape(name: str, image: Image.Image, shorter: int) -> None:
    """Refuse a picture that is all but a line: with its shorter side resized it would fill the memory."""
    longer = max(image.size) * shorter // min(image.size)
    if longer * shorter > LARGEST_RESIZED:
        raise DataError(
            f"{name} is {image.height}x{image.width}, and resized would be {longer} pixels long: crop it or delete it"
        )


def _resize(image: Image.Image, shorter: int) -> Image.Image:
    """Resize the shorter side; the longer one is rounded down, as torchvision's Resize does."""
    smallest = min(image.size)
    if smallest == shorter:
        return image
    width, height = (shorter * side // smallest for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _center(image: Image.Image, size: int) -> Image.Image:
    """Crop the center; halves of pixels are rounded as torchvision's CenterCrop does."""
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))
