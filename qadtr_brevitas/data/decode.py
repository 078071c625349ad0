"""Decode pictures into one uint8 array, on several threads; the result is kept in the cache folder."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from math import prod
from pathlib import Path

import numpy

from qadtr_brevitas.core.errors import QadtrError
from qadtr_brevitas.core.files import write_atomically
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.data.archives import cache_folder
from qadtr_brevitas.data.listing import Pictures
from qadtr_brevitas.data.picture import Decoding, Pixels

logger = logging.getLogger(__name__)

CHUNK = 128
THREADS = 8
# Reading fewer bytes is done before one has read a message about it.
_TOLD_FROM = 20_000_000
# Decoding that takes less time is not worth a file.
CACHE_FROM_SECONDS = 2.0
_DAMAGED_SHOWN = 5


def read_images(
    pictures: Pictures,
    decoding: Decoding,
    *,
    way: str,
    progress: Progress | None = None,
) -> Pixels:
    """Decode every picture to RGB, or read what an earlier call has kept.

    Args:
        pictures: the pictures.
        decoding: how they become images of one size.
        way: names the decoding in the cache.
        progress: called with the images done and the images in all.

    Returns:
        uint8 (N, 3, H, W).

    Raises:
        DataError: a picture cannot be read, or pictures differ in size.
    """
    shape = (len(pictures), 3, *decoding.size)
    cache = _cache_file(pictures, way)
    if (kept := _read_cache(cache, shape)) is not None:
        return kept
    _tell_cache(shape)
    started = time.monotonic()
    images = numpy.empty(shape, dtype=numpy.uint8)
    damaged: list[str] = []
    with ThreadPoolExecutor(thread_count()) as pool:
        try:
            work = pool.map(lambda chunk: _decode_chunk(pictures, chunk, images, decoding, damaged), _chunks(shape[0]))
            for done in work:
                if progress:
                    progress(done, shape[0])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    tell_damaged(damaged, before=0)
    # Those who look at the images again are to hear of damaged ones again.
    if not damaged and time.monotonic() - started > CACHE_FROM_SECONDS:
        _write_cache(cache, images)
    return images


def thread_count() -> int:
    """Return how many threads decode at a time."""
    return min(THREADS, os.cpu_count() or 1)


def tell_damaged(messages: Sequence[str], *, before: int) -> None:
    """Tell people about pictures that were replaced, the first by name and how many there are.

    Args:
        messages: what was wrong with each.
        before: how many were told earlier.
    """
    for number, message in enumerate(messages, before + 1):
        if number <= _DAMAGED_SHOWN:
            logger.warning("skipped (data.dataset.skip_damaged): %s", message)
    total = before + len(messages)
    if messages and total > _DAMAGED_SHOWN:
        logger.warning("skipped %d damaged images so far (data.dataset.skip_damaged)", total)


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


def _decode_chunk(pictures: Pictures, chunk: range, images: Pixels, decoding: Decoding, damaged: list[str]) -> int:
    for index in chunk:
        images[index] = decoding.decode(pictures, index, report=damaged.append)
    return chunk.stop


def _cache_file(pictures: Pictures, way: str) -> Path:
    # One file for each way to read the folder; changes of its files change the digest alone.
    way = f"{pictures.folder.resolve()}/{pictures.part}/{way}"
    place = blake2b(os.fsencode(way), digest_size=6).hexdigest()
    return cache_folder() / "decoded" / f"{place}-{pictures.digest}.npy"


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
