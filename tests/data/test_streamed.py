"""Splits that are read from their files: the same images as in memory, whatever the pictures are like."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from qadtr_brevitas.core.errors import DataError
from qadtr_brevitas.data.image_folder import ImageFolder
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.data.streamed import StreamedSplit
from qadtr_brevitas.testing.datasets import check_dataset
from tests.data.support import picture

ROTATED_LEFT, ORIENTATION = 6, 0x0112


@pytest.fixture
def pictures(folder: Path) -> Path:
    """Five pictures of other sizes and kinds in each class."""
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            place = folder / split / name
            picture(5, (12, 20)).save(place / "jpeg.jpg")
            picture(6, (9, 9)).convert("CMYK").save(place / "cmyk.jpg")
            picture(7, (10, 8)).convert("RGBA").save(place / "rgba.png")
    return folder


def load(root: Path, split: str = "train", **keys: object) -> tuple[Split, StreamedSplit]:
    """A split in memory, and the same one streamed."""
    held = ImageFolder(root=str(root), image_size=8, stream=False, **keys).load(split)
    streamed = ImageFolder(root=str(root), image_size=8, stream=True, **keys).load(split)
    assert isinstance(streamed, StreamedSplit)
    return held, streamed


def test_images_are_those_in_memory(pictures: Path) -> None:
    held, streamed = load(pictures)
    assert (len(streamed), streamed.channels, streamed.image_size) == (10, 3, (8, 8))
    assert torch.equal(streamed.labels, held.labels)
    assert torch.equal(streamed.images, held.images)
    some = torch.tensor([9, 0, 3])
    assert all(map(torch.equal, streamed.batch(some), held.batch(some)))
    for one, other in zip(streamed.batches(4), held.batches(4), strict=True):
        assert all(map(torch.equal, one, other))


def test_parts_are_those_in_memory(pictures: Path) -> None:
    held, streamed = load(pictures)
    for one, other in zip(streamed.divide(4, seed=1), held.divide(4, seed=1), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    few = streamed.balanced(4, seed=2).subset(torch.tensor([1, 3]))
    assert torch.equal(few.images, held.balanced(4, seed=2).images[[1, 3]])
    assert (few.available, streamed.available) == (10, 10)


def test_the_contract_of_data_sets_holds(pictures: Path) -> None:
    check_dataset(ImageFolder(root=str(pictures), image_size=8, stream=True))


@pytest.mark.parametrize(("keys", "streams"), [({}, False), ({"max_gb": 1e-6}, True), ({"stream": True}, True)])
def test_size_decides_and_a_line_says_so(
    pictures: Path, keys: dict, streams: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qadtr_brevitas.data.picture_set._TOLD_FROM", 1)
    with caplog.at_level(logging.INFO, logger="qadtr_brevitas"):
        split = ImageFolder(root=str(pictures), image_size=8, **keys).load("train")
    assert isinstance(split, StreamedSplit) is streams
    reason = "data.dataset.stream" if "stream" in keys else "data.dataset.max_gb"
    assert "10 images of 8x8" in caplog.text
    assert reason in caplog.text


def test_test_images_are_held_up_to_an_eighth_of_the_limit(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each split needs 1.92e-6 GB; where an evaluation runs, training images may be missing."""
    (pictures / "train").rename(pictures / "elsewhere")
    with caplog.at_level(logging.INFO, logger="qadtr_brevitas"):
        held, streamed, forced = (
            ImageFolder(root=str(pictures), image_size=8, **keys).load("test")
            for keys in ({"max_gb": 1.6e-5}, {"max_gb": 1.5e-5}, {"max_gb": 1.5e-5, "stream": False})
        )
    assert [isinstance(split, StreamedSplit) for split in (held, streamed, forced)] == [False, True, False]
    assert torch.equal(streamed.batch(torch.arange(10))[0], held.batch(torch.arange(10))[0])
    assert "max_gb is 1.5e-05, 1.88e-06 for test images" in caplog.text


def test_all_images_at_once_are_refused_above_the_limit(pictures: Path) -> None:
    split = ImageFolder(root=str(pictures), image_size=8, max_gb=1e-6).load("train")
    with pytest.raises(DataError, match=r"10 images of 8x8.*1.92e-06 GB.*max_gb"):
        _ = split.images
    assert len(split.balanced(5, seed=0).images) == 5


def test_the_fingerprint_changes_with_a_file_a_label_and_the_size(pictures: Path) -> None:
    def fingerprint(size: int = 8) -> str:
        return ImageFolder(root=str(pictures), image_size=size, stream=True).load("train").fingerprint

    first = fingerprint()
    (pictures / "train" / "cat" / "0.png").touch()
    assert fingerprint() == first
    other_size = fingerprint(9)
    picture(77).save(pictures / "train" / "cat" / "0.png")
    assert len({first, other_size, fingerprint()}) == 3


def test_pictures_are_turned_upright_only_if_asked_for(folder: Path) -> None:
    file = folder / "train" / "cat" / "0.png"
    plain = picture(3)
    exif = Image.Exif()
    exif[ORIENTATION] = ROTATED_LEFT
    plain.save(file, exif=exif)
    as_stored, upright = (
        ImageFolder(root=str(folder), upright=turn, stream=stream).load("train").images[0].permute(1, 2, 0).numpy()
        for turn, stream in ((False, False), (True, True))
    )
    assert numpy.array_equal(as_stored, numpy.asarray(plain))
    assert numpy.array_equal(upright, numpy.rot90(numpy.asarray(plain), -1))


class TestDamaged:
    @pytest.fixture
    def damaged(self, pictures: Path) -> Path:
        """The second of five cats of each split cannot be read."""
        for split in ("train", "test"):
            file = pictures / split / "cat" / "1.png"
            file.write_bytes(file.read_bytes()[:40])
        return pictures

    @pytest.mark.parametrize("stream", [True, False])
    @pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
    def test_a_jpeg_that_is_cut_in_the_middle_of_its_pixels_is_named(
        self, pictures: Path, stream: bool, share: float
    ) -> None:
        file = pictures / "train" / "dog" / "jpeg.jpg"
        picture(5, (64, 64)).save(file)
        whole = file.read_bytes()
        assert ImageFolder(root=str(pictures), image_size=8, stream=stream).load("train").images.shape[0] == 10
        file.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(DataError, match=r"cannot read .*dog/jpeg.jpg .*truncated"):
            ImageFolder(root=str(pictures), image_size=8, stream=stream).load("train").batch(torch.arange(10))

    @pytest.mark.parametrize("stream", [True, False])
    def test_it_is_named(self, damaged: Path, stream: bool) -> None:
        dataset = ImageFolder(root=str(damaged), image_size=8, stream=stream)
        with pytest.raises(DataError, match=r"cannot read .*cat/1.png"):
            dataset.load("train").batch(torch.arange(10))

    @pytest.mark.parametrize("stream", [True, False])
    def test_it_is_skipped_if_asked_for_and_counted(
        self, damaged: Path, stream: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        dataset = ImageFolder(root=str(damaged), image_size=8, stream=stream, skip_damaged=True)
        split = dataset.load("train")
        images, labels = split.batch(torch.arange(10))
        assert torch.equal(images[1], images[2])
        assert labels.bincount().tolist() == [5, 5]
        assert caplog.text.count("WARNING") == 1
        assert "cat/1.png" in caplog.text

    def test_it_counts_as_an_error_among_test_images(self, damaged: Path) -> None:
        dataset = ImageFolder(root=str(damaged), image_size=8, stream=True, skip_damaged=True)
        with pytest.raises(DataError, match=r"cannot read .*cat/1.png"):
            dataset.load("test").batch(torch.arange(10))

    def test_a_class_without_a_picture_that_can_be_read(self, damaged: Path) -> None:
        for file in (damaged / "train" / "cat").iterdir():
            file.write_bytes(b"no image")
        dataset = ImageFolder(root=str(damaged), image_size=8, stream=True, skip_damaged=True)
        with pytest.raises(DataError, match="class 'cat'"):
            dataset.load("train").batch(torch.arange(2))


def test_a_file_that_is_gone_is_named(pictures: Path) -> None:
    _, split = load(pictures)
    (pictures / "train" / "dog" / "0.png").unlink()
    with pytest.raises(DataError, match=r"dog/0.png.*No such file"):
        list(split.batches(5))
