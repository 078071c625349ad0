"""The data sets that need no files of the user's: digits and shapes."""

from importlib.resources import files

import pytest
import torch

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.data.digits import MIN_CONTRAST, Digits
from qadtr_brevitas.data.shapes import SHAPES, Shapes


@pytest.mark.parametrize("dataset", [Digits(), Shapes(image_size=8, train_images=10, test_images=10)], ids=repr)
def test_unknown_split(dataset: Digits | Shapes) -> None:
    with pytest.raises(UsageError, match="unknown split 'val': choose from train, test"):
        dataset.load("val")


@pytest.mark.parametrize("dataset", [Digits(), Shapes(image_size=8)], ids=repr)
def test_a_limit_draws_what_balanced_draws(dataset: Digits | Shapes) -> None:
    some = dataset.load("test", limit=30, seed=4)
    assert torch.equal(some.images, dataset.load("test").balanced(30, seed=4).images)
    assert some.available == dataset.load("test").available > 30 == len(some)
    assert len(dataset.load("test", limit=100_000)) == some.available


def test_digits_splits() -> None:
    train, test = Digits().load("train"), Digits().load("test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.image_size == (32, 32)
    assert train.classes == tuple("0123456789")
    assert test.labels.bincount().tolist() == [36] * 10


def test_digits_seed_changes_the_drawing_and_not_the_split() -> None:
    first, again, other = (Digits(seed=seed).load("test") for seed in (0, 0, 1))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert torch.equal(first.labels, other.labels)


def test_digits_have_contrast_and_places_of_their_own() -> None:
    images = Digits().load("train").images.float() / 255
    luminance = (images * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)
    span = luminance.flatten(1).amax(1) - luminance.flatten(1).amin(1)
    assert span.min() > 0.9 * MIN_CONTRAST
    background = images[:, :, :1, :1]
    drawn_rows = ((images - background).abs().amax(1) > 0.05).any(2).int().argmax(1)
    assert len(drawn_rows.unique()) >= 9


def test_digits_file_is_small_and_attributed() -> None:
    folder = files("qadtr_brevitas.data")
    assert len(folder.joinpath("digits.npz").read_bytes()) <= 60_000
    notice = folder.joinpath("digits.LICENSE.txt").read_text()
    assert all(words in notice for words in ("Alpaydin", "Kaynak", "10.24432/C50P49", "CC BY 4.0"))


@pytest.mark.parametrize(("size", "classes"), [(8, 2), (32, 10), (65, 5)])
def test_shapes_of_any_size_and_number(size: int, classes: int) -> None:
    dataset = Shapes(image_size=size, classes=classes, train_images=3 * classes, test_images=classes)
    train, test = dataset.load("train"), dataset.load("test")
    assert train.images.shape == (3 * classes, 3, size, size)
    assert train.labels.bincount().tolist() == [3] * classes
    assert len(test) == classes
    assert train.classes == SHAPES[:classes]
    assert not torch.equal(train.images[:classes], test.images)
    assert torch.equal(train.images, dataset.load("train").images)


def test_shapes_tell_their_progress() -> None:
    told: list[tuple[int, int]] = []
    Shapes(train_images=300, image_size=8).load("train", progress=lambda done, total: told.append((done, total)))
    assert told == [(256, 300), (300, 300)]


def test_shapes_can_be_told_apart() -> None:
    split = Shapes(train_images=400).load("train")
    # The shape is the bright part. Shapes differ in how much they cover and in how much of their center they fill.
    masks = (split.images.amin(1) > 145) | (split.images.amax(1) > 220)
    area = masks.float().mean((1, 2))
    means = torch.stack([area[split.labels == label].mean() for label in range(10)])
    assert means[SHAPES.index("square")] > means[SHAPES.index("cross")] > means[SHAPES.index("column")]
    assert area.min() > 0
