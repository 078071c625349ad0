"""Small images, and tars of folders."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy
from PIL import Image


def picture(number: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    pixels = numpy.random.default_rng(number).integers(0, 256, (*size, 3), dtype=numpy.uint8)
    return Image.fromarray(pixels)


def tar_of(folder: Path, file: Path, name: str) -> Path:
    with tarfile.open(file, "w") as tar:
        tar.add(folder, name)
    return file
