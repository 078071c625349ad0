import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qadtr_brevitas.core.errors import DataError, UsageError
from qadtr_brevitas.data.split import Split, differing_class, epoch_order


def make_split(labels: list[int], classes: int = 3) -> Split:
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 5).contiguous()
    return Split(images, torch.tensor(labels, dtype=torch.int64), tuple("abcdefgh"[:classes]))


def test_batch_is_float_in_0_1() -> None:
    split = Split(torch.tensor([0, 51, 255]).to(torch.uint8).view(1, 3, 1, 1), torch.tensor([0]), ("a",))
    images, labels = split.batch(torch.tensor([0]))
    assert torch.equal(images.flatten(), torch.tensor([0.0, 0.2, 1.0]))
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64


def test_image_size_is_height_and_width() -> None:
    assert make_split([0, 1]).image_size == (4, 5)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.data())
def test_divide_is_a_balanced_partition(labels: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(labels)))
    split = make_split(labels)
    chosen, rest = split.divide(count, seed=data.draw(st.integers(0, 5)))
    assert len(chosen) == count
    numbers = [int(x) for part in (chosen, rest) for x in part.images[:, 0, 0, 0]]
    assert sorted(numbers) == list(range(len(labels)))
    assert all(labels[int(x)] == y for x, y in zip(chosen.images[:, 0, 0, 0], chosen.labels, strict=True))
    # No class may get two more than another one that still has images left.
    counts, left = chosen.labels.bincount(minlength=3), rest.labels.bincount(minlength=3)
    assert all(counts.max() - counts[label] <= 1 for label in range(3) if left[label])


def test_balanced_depends_on_the_seed_only() -> None:
    split = make_split([0, 1, 2] * 20)
    first, again, other = (split.balanced(12, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert first.labels.bincount().tolist() == [4, 4, 4]


@pytest.mark.parametrize("count", [0, 4])
def test_impossible_counts_are_refused(count: int) -> None:
    with pytest.raises(UsageError, match=f"{count} .*from 1 to 3"):
        make_split([0, 1, 2]).balanced(count, seed=0)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(1, 3, 2, 2), torch.tensor([0]), "a split holds torch.uint8 of shape"),
        (torch.zeros(1, 2, 2, dtype=torch.uint8), torch.tensor([0]), "a split holds torch.uint8 of shape"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.tensor([0, 0]), "one torch.int64 for each of its 1 images"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.tensor([2]), "not all in 0..1, but there are 2 classes"),
    ],
)
def test_wrong_tensors_are_refused(images: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Split(images, labels, ("a", "b"))


def test_epoch_order_is_a_permutation_of_its_own_each_epoch() -> None:
    first, again, next_epoch = (epoch_order(50, seed=3, epoch=epoch) for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, next_epoch)
    assert sorted(first.tolist()) == list(range(50))


def test_classes_in_another_unicode_form_are_the_same() -> None:
    assert differing_class(["caf\u00e9", "tea"], ["cafe\u0301", "tea"]) is None
    assert differing_class(["caf\u00e9", "tea"], ["cafe", "tea"]) == 0
