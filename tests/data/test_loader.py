"""Batches that worker processes make: the same whatever their number and wherever a run resumes."""

from __future__ import annotations

import io
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

from qadtr_brevitas.core.errors import DataError
from qadtr_brevitas.data.image_folder import ImageFolder
from qadtr_brevitas.data.loader import BatchLoader, Request
from qadtr_brevitas.data.mixing import Mixing
from qadtr_brevitas.data.split import Split, epoch_order
from qadtr_brevitas.data.transform import TrainingTransform, own_random_streams
from tests.data.support import picture

ALL = {"scale": (0.3, 1.0), "rand_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.3, "erase": 0.5}
STEPS = 6


@pytest.fixture
def split(folder: Path) -> Split:
    """Twelve pictures of several sizes, streamed at 8x8."""
    for name in ("cat", "dog"):
        for number in range(4):
            picture(number, (10 + number, 16)).save(folder / "train" / name / f"large{number}.png")
    return ImageFolder(root=str(folder), image_size=8, stream=True).load("train")


def loader(split: Split, workers: int, *, transform: bool = True) -> BatchLoader:
    def request(step: int) -> Request:
        epoch, position = divmod(step, 3)
        return Request(epoch, epoch_order(len(split), seed=0, epoch=epoch)[4 * position : 4 * position + 4])

    changes = TrainingTransform(size=(8, 8), **ALL) if transform else None
    return BatchLoader(split, changes, request, seed=7, workers=workers)


def make(source: BatchLoader, steps: range) -> list[Tensor]:
    return [source.pixels(step) for step in steps]


@pytest.fixture
def whole(split: Split) -> list[Tensor]:
    """All batches of two epochs, made in this process."""
    return make(loader(split, 0), range(STEPS))


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("first", [0, 2])
def test_batches_are_the_same_with_any_number_of_workers_from_any_step_on(
    split: Split, whole: list[Tensor], workers: int, first: int
) -> None:
    source = loader(split, workers)
    batches = make(source, range(first, STEPS))
    assert all(map(torch.equal, batches, whole[first:]))
    source.close()


def test_an_image_is_changed_anew_in_every_epoch(whole: list[Tensor]) -> None:
    images = [image for batch in whole for image in batch]
    assert len({image.numpy().tobytes() for image in images}) == len(images)


def test_without_transforms_images_are_those_of_the_split(split: Split) -> None:
    source, order = loader(split, 0, transform=False), epoch_order(len(split), seed=0, epoch=0)
    assert torch.equal(torch.cat(make(source, range(3))), split.images[order])


@pytest.mark.parametrize("workers", [0, 1])
def test_global_random_streams_are_left_alone(split: Split, workers: int) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), numpy.random.rand(), float(torch.rand(()))

    random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
    expected = draw()
    random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
    source = loader(split, workers)
    source.pixels(0)
    assert draw() == expected
    source.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_in_the_middle_of_an_epoch_is_named(split: Split, folder: Path, workers: int) -> None:
    (folder / "train" / "cat" / "large2.png").write_bytes(b"no image")
    source = loader(split, workers)
    with pytest.raises(DataError, match=r"^cannot read .*cat/large2.png"):
        make(source, range(3))


def cut(file: Path) -> None:
    """Make a picture a JPEG that ends in the middle of its compressed pixels, as downloads do."""
    content = io.BytesIO()
    picture(9, (64, 64)).save(content, format="jpeg")
    file.write_bytes(content.getvalue()[: len(content.getvalue()) // 2])


@pytest.mark.parametrize("transform", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_pictures_are_replaced_by_the_next_of_their_class_and_counted_once(
    split: Split, folder: Path, workers: int, transform: bool, caplog: pytest.LogCaptureFixture
) -> None:
    # Pictures 0, 1, large0 to large3 of each class.
    replaced = {"large1.png": "large3.png", "large2.png": "large3.png", "1.png": "large0.png"}
    for name in ("cat", "dog"):
        for file, other in replaced.items():
            shutil.copy(folder / "train" / name / other, folder / "train" / name / file)
    expected = make(loader(split, 0, transform=transform), range(STEPS))
    for name in ("cat", "dog"):
        for file in replaced:
            cut(folder / "train" / name / file)
    whole = ImageFolder(root=str(folder), image_size=8, stream=True, skip_damaged=True).load("train")
    source = loader(whole, workers, transform=transform)
    assert all(map(torch.equal, make(source, range(STEPS)), expected))
    source.close()
    # Both epochs met all six; five are named.
    named = [record.getMessage() for record in caplog.records if "truncated" in record.getMessage()]
    assert len(set(named)) == len(named) == 5
    assert "skipped 6 damaged images so far" in caplog.text
    assert "skipped 7" not in caplog.text


def children() -> Iterator[int]:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if parent == os.getpid():
            yield int(process.name)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the worker in /proc")
def test_a_killed_worker_is_an_error_and_the_next_batch_starts_another(split: Split, whole: list[Tensor]) -> None:
    source, before = loader(split, 1), set(children())
    source.pixels(0)
    for worker in set(children()) - before:
        os.kill(worker, signal.SIGKILL)
    with pytest.raises(DataError, match=r"has ended.*data\.workers"):
        make(source, range(1, STEPS))
    assert torch.equal(source.pixels(1), whole[1])
    source.close()


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset by peer"), EOFError()])
def test_a_worker_that_is_killed_while_it_writes_is_named_too(
    split: Split, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: BatchLoader, step: int) -> Iterator[None]:
        raise error
        yield

    monkeypatch.setattr(BatchLoader, "_start", broken)
    with pytest.raises(DataError, match=r"has ended.*data\.workers"):
        loader(split, 1).pixels(0)
    with pytest.raises(type(error)):
        loader(split, 0).pixels(0)


def test_what_is_erased_stays_within_the_pixels_and_the_rest_as_it_is() -> None:
    image = picture(0, (32, 32))
    plain = TrainingTransform(size=(32, 32), flip=0)
    for mode in ("const", "rand", "pixel"):
        erasing = TrainingTransform(size=(32, 32), flip=0, erase=1.0, erase_mode=mode)
        with own_random_streams():
            before, after = plain(image, seed=3), erasing(image, seed=3)
        same = (before == after).all(dim=0)
        assert after.dtype == torch.uint8
        assert 0.02 < (~same).float().mean() < 0.5


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_images_have_labels_in_the_same_shares(mixup: float, cutmix: float) -> None:
    """One-hot images make the share of each class the mean of its channel."""
    labels = torch.arange(6) % 3
    images = torch.eye(3)[labels][:, :, None, None].expand(-1, -1, 8, 8).clone()
    mixed, larger, shares = Mixing(classes=3, mixup=mixup, cutmix=cutmix)(images, labels, seed=5)
    assert torch.allclose(mixed.mean(dim=(2, 3)), shares, atol=1e-6)
    assert torch.equal(larger, shares.argmax(dim=1))
    assert not torch.equal(shares, torch.eye(3)[labels])
