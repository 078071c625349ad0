"""Contract checks of data sets, for this package's own and for those of other packages.

from qadtr_brevitas.testing.datasets import check_dataset

def test_mine():
check_dataset(MyImages(root="small"))
"""

from __future__ import annotations

import torch

from qadtr_brevitas.core.errors import QadtrError
from qadtr_brevitas.data.base import Dataset
from qadtr_brevitas.data.split import SPLITS, Split


def check_dataset(dataset: Dataset) -> None:
    """Check that a data set loads both splits, whole and limited, the same each time.

    Args:
        dataset: one with at least two images of each class in each split.

    Raises:
        AssertionError: the data set breaks the contract; the message says how.
    """
    splits = {name: dataset.load(name) for name in SPLITS}
    for name, split in splits.items():
        assert isinstance(split, Split), f"load({name!r}) returns {type(split).__name__}, not a Split"
        assert len(split) > 0, f"the split {name!r} is empty"
        _check_limit(dataset, name, split)
        again = dataset.load(name)
        assert _equal(split, again), f"load({name!r}) gives other images the second time"
    assert splits["train"].classes == splits["test"].classes, "both splits must have the same classes"
    try:
        dataset.load("no-such-split")
    except QadtrError:
        return
    raise AssertionError("load() of an unknown split must raise a UsageError or DataError")


def _check_limit(dataset: Dataset, name: str, whole: Split) -> None:
    limit = max(1, len(whole) // 2)
    some, same = (dataset.load(name, limit=limit, seed=3) for _ in range(2))
    assert len(some) == limit, f"load({name!r}, limit={limit}) gives {len(some)} images"
    assert _equal(some, same), "the same limit and seed must give the same images"
    assert some.classes == whole.classes, "a limit must not change the classes"
    assert some.available == len(whole), f"a limited split must say that there are {len(whole)} images"
    counts = some.labels.bincount(minlength=len(some.classes))
    possible = whole.labels.bincount(minlength=len(whole.classes))
    # Classes with room for more are within one image of each other.
    free = counts[counts < possible]
    assert len(free) == 0 or int(free.max() - free.min()) <= 1, "a limit must draw equally many images of each class"


def _equal(one: Split, other: Split) -> bool:
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
