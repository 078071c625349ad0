"""Pictures that are not RGB of 8 bit: their pixels are those that Pillow, or the numbers written, say."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image, ImageOps

from qadtr_brevitas.data.image_folder import ImageFolder
from qadtr_brevitas.data.loader import BatchLoader, Request
from qadtr_brevitas.data.transform import TrainingTransform
from tests.data.support import picture

SIZE = (10, 14)
ORIENTATION = 0x0112


def only(folder: Path, **keys: Any) -> numpy.ndarray:
    """The first training image, uint8 (H, W, 3), read in every way that there is: all have to agree."""
    splits = [ImageFolder(root=str(folder), stream=stream, **keys).load("train") for stream in (True, False)]
    whole = TrainingTransform(size=splits[0].image_size, flip=0)
    images = [
        splits[0].pixels(0),
        splits[1].pixels(0),
        splits[0].batch(torch.tensor([0]))[0][0].mul(255).round().to(torch.uint8),
        torch.from_numpy(numpy.array(splits[0].whole_picture(0))).permute(2, 0, 1),
        BatchLoader(splits[0], whole, lambda step: Request(0, torch.tensor([0])), seed=0, workers=0).pixels(0)[0],
    ]
    assert all(torch.equal(image, images[0]) for image in images[1:])
    return images[0].permute(1, 2, 0).numpy()


@pytest.fixture
def place(folder: Path) -> Path:
    """A folder whose training pictures are all to be replaced but one of each class, with pictures of SIZE."""
    for file in folder.rglob("*.png"):
        picture(0, SIZE).save(file)
    return folder


def with_alpha(mode: str) -> Image.Image:
    image = picture(3, SIZE).convert(mode)
    image.putalpha(Image.fromarray(numpy.arange(140, dtype=numpy.uint8).reshape(SIZE)))
    return image


@pytest.mark.parametrize(
    ("image", "suffix"),
    [
        (picture(1, SIZE).convert("CMYK"), "jpg"),
        (picture(2, SIZE).convert("CMYK"), "tif"),
        (with_alpha("RGB"), "png"),
        (with_alpha("L"), "png"),
        (picture(4, SIZE).quantize(16), "png"),
        (picture(5, SIZE).convert("1"), "png"),
        (picture(6, SIZE).convert("YCbCr"), "jpg"),
    ],
    ids=lambda value: getattr(value, "mode", value),
)
def test_modes_are_converted_as_pillow_does(place: Path, image: Image.Image, suffix: str) -> None:
    (place / "train" / "cat" / "0.png").unlink()
    file = place / "train" / "cat" / f"0.{suffix}"
    image.save(file)
    with Image.open(file) as stored:
        expected = numpy.asarray(stored.convert("RGB"))
    assert numpy.array_equal(only(place), expected)


def test_an_alpha_channel_is_left_out_and_not_blended(place: Path) -> None:
    with_alpha("RGB").save(place / "train" / "cat" / "0.png")
    assert numpy.array_equal(only(place), numpy.asarray(picture(3, SIZE)))


def png_of_16_bit(pixels: numpy.ndarray) -> bytes:
    """A PNG of 16 bit a value, gray (H, W) or RGB (H, W, 3), which Pillow cannot write in color."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("shape", [SIZE, (*SIZE, 3)], ids=["gray", "color"])
def test_of_16_bit_the_upper_byte_is_kept(place: Path, shape: tuple[int, ...]) -> None:
    values = numpy.random.default_rng(7).integers(0, 65536, shape, dtype=numpy.uint16)
    (place / "train" / "cat" / "0.png").write_bytes(png_of_16_bit(values))
    expected = (values >> 8).astype(numpy.uint8)
    assert numpy.array_equal(only(place), expected if len(shape) == 3 else numpy.stack([expected] * 3, axis=2))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_by_their_exif_tag_only_if_asked_for(place: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = place / "train" / "cat" / "0.png"
    picture(8, SIZE).save(file, exif=exif)
    with Image.open(file) as stored:
        upright = numpy.asarray(ImageOps.exif_transpose(stored))
    assert numpy.array_equal(only(place), numpy.asarray(picture(8, SIZE)))
    if upright.shape[:2] != SIZE:
        # Both splits then have pictures on their sides.
        for other in place.rglob("*.png"):
            picture(8, SIZE).save(other, exif=exif)
    assert numpy.array_equal(only(place, upright=True), upright)
