"""Decode image files into one uint8 array, on several threads; the result is kept in the cache folder."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from math import floor, prod
from pathlib import Path
from typing import TypeAlias

import numpy
from PIL import Image

from qadtr_brevitas.core.errors import DataError, QadtrError
from qadtr_brevitas.core.files import write_atomically
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.data.archives import cache_folder
from qadtr_brevitas.data.listing import Listing, printable

logger = logging.getLogger(__name__)

Pixels: TypeAlias = "numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.uint8]]"

CHUNK = 128
THREADS = 8
# Pillow reads grays of 16 bit in these formats as 32 bit, some of them in earlier versions only.
_GRAYS_OF_16_BIT = ("PNG", "PPM")
# Pixels of a resized image: 0.6 GB on 8 threads.
LARGEST_RESIZED = 25_000_000
# Reading fewer bytes is done before one has read a message about it.
_TOLD_FROM = 20_000_000
# Decoding that takes less time is not worth a file.
CACHE_FROM_SECONDS = 2.0


def read_images(
    listing: Listing,
    *,
    image_size: int | None,
    crop: float = 1.0,
    max_gb: float,
    progress: Progress | None = None,
) -> Pixels:
    """Decode every image of a listing to RGB, or read what an earlier call has kept.

    Args:
        listing: the files.
        image_size: height and width in pixels, reached by resizing the shorter side to image_size / crop (bicubic) and
            cropping the center, as timm does for evaluation; None if all images have the same size already.
        crop: timm's crop_pct, in (0, 1].
        max_gb: the most memory to use, in 10^9 bytes.
        progress: called with the images done and the images in all.

    Returns:
        uint8 (N, 3, H, W).

    Raises:
        DataError: an image that cannot be read, images of different sizes, or more than `max_gb` of them.
    """
    size = (image_size, image_size) if image_size else size_of(listing.paths[0])
    shape = (len(listing.paths), 3, *size)
    _check_memory(shape, max_gb)
    cache = _cache_file(listing, image_size, crop)
    if (kept := _read_cache(cache, shape)) is not None:
        return kept
    _tell_cache(shape)
    started = time.monotonic()
    images = numpy.empty(shape, dtype=numpy.uint8)
    shorter = floor(image_size / crop) if image_size else None
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        try:
            for done in pool.map(lambda chunk: _decode_chunk(listing, chunk, images, shorter), _chunks(shape[0])):
                if progress:
                    progress(done, shape[0])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if time.monotonic() - started > CACHE_FROM_SECONDS:
        _write_cache(cache, images)
    return images


def _tell_cache(shape: tuple[int, ...]) -> None:
    size = prod(shape)
    if size >= _TOLD_FROM:
        logger.info(
            "reading %s images for the first time: they are kept decoded in %s (%.0f MB; XDG_CACHE_HOME moves it)",
            f"{shape[0]:,}",
            cache_folder(),
            size / 1e6,
        )


def _chunks(count: int) -> Iterator[range]:
    return (range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))


def _decode_chunk(listing: Listing, chunk: range, images: Pixels, shorter: int | None) -> int:
    for index in chunk:
        images[index] = _decode(listing.paths[index], images.shape[2:], shorter)
    return chunk.stop


def _decode(path: str, size: tuple[int, ...], shorter: int | None) -> Pixels:
    """Return one image, uint8 (3, H, W), with its shorter side resized unless `shorter` is None."""
    try:
        with Image.open(path) as file:
            image = _eight_bit(path, file).convert("RGB")
    except QadtrError:
        raise
    # Decoders raise whatever the libraries below them do, RuntimeError and struct.error among it.
    except Exception as error:
        raise _unreadable(path, error) from error
    height, width = size
    if shorter is not None:
        _check_shape(path, image, shorter)
        image = _center(_resize(image, shorter), height)
    if image.size != (width, height):
        raise DataError(
            f"{printable(path)} is {image.height}x{image.width}, but the first image is {height}x{width}: "
            "set data.dataset.image_size to resize all images to one size"
        )
    return numpy.asarray(image).transpose(2, 0, 1)


def _eight_bit(path: str, image: Image.Image) -> Image.Image:
    """Return the upper byte of 16-bit grays, which Pillow would clip to white; it does so with 16-bit colors itself."""
    if image.mode not in ("F", "I") and not image.mode.startswith("I;16"):
        return image
    if image.mode == "F" or (image.mode == "I" and image.format not in _GRAYS_OF_16_BIT):
        raise DataError(
            f"{printable(path)} has grays of 32 bit, whose black and white are not known: save it with 8 or 16 bit"
        )
    return Image.fromarray((numpy.asarray(image) >> 8).astype(numpy.uint8))


def _check_shape(path: str, image: Image.Image, shorter: int) -> None:
    """Refuse a picture that is all but a line: with its shorter side resized it would fill the memory."""
    longer = max(image.size) * shorter // min(image.size)
    if longer * shorter > LARGEST_RESIZED:
        raise DataError(
            f"{printable(path)} is {image.height}x{image.width}, and resized would be {longer} pixels long: crop it or "
            "delete it"
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


def size_of(path: str) -> tuple[int, int]:
    """Return height and width of an image without decoding it.

    Raises:
        DataError: the image cannot be read.
    """
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> DataError:
    return DataError(f"cannot read the image {printable(path)} ({error}): replace it or delete it")


def _check_memory(shape: tuple[int, ...], max_gb: float) -> None:
    count, _, height, width = shape
    needed = count * 3 * height * width / 1e9
    if needed > max_gb:
        raise DataError(
            f"{count} images of {height}x{width} need {needed:.3g} GB of memory, more than max_gb = {max_gb:g}: "
            "set data.dataset.image_size smaller or data.dataset.max_gb larger"
        )


def _cache_file(listing: Listing, image_size: int | None, crop: float) -> Path:
    # One file for each way to read the folder; changes of its files change the digest alone.
    way = f"{listing.folder.resolve()}/{listing.part}/{image_size}/{crop}"
    place = blake2b(os.fsencode(way), digest_size=6).hexdigest()
    return cache_folder() / "decoded" / f"{place}-{listing.digest}.npy"


def _read_cache(cache: Path, shape: tuple[int, ...]) -> Pixels | None:
    try:
        # The processes of torchrun share one copy in memory.
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        kept = numpy.load(cache, allow_pickle=False, mmap_mode="c" if several else None)
    except (OSError, ValueError, EOFError):
        return None
    return kept if kept.shape == shape and kept.dtype == numpy.uint8 else None


def _write_cache(cache: Path, images: Pixels) -> None:
    try:
        write_atomically(cache, lambda path: numpy.save(path, images, allow_pickle=False))
        for old in cache.parent.glob(f"{cache.name.partition('-')[0]}-*.npy"):
            if old != cache:
                old.unlink(missing_ok=True)
    except (OSError, QadtrError):
        # Without a cache the next start takes longer; nothing else changes.
        return
