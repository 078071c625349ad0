"""Every registered data set fulfills the contract, and the contract tells what a data set breaks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.core.registry import DATASETS
from qadtr_brevitas.data.base import Dataset
from qadtr_brevitas.data.digits import Digits
from qadtr_brevitas.data.image_folder import ImageFolder
from qadtr_brevitas.data.shapes import Shapes
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.testing.datasets import check_dataset


def image_folder(root: Path) -> ImageFolder:
    for split, count in (("train", 5), ("test", 3)):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                color = (40 * number, 100 * label, 7)
                Image.new("RGB", (8, 8), color).save(root / split / name / f"{number}.png")
    return ImageFolder(root=str(root), image_size=8)


def test_data_sets_without_files() -> None:
    check_dataset(Digits())
    check_dataset(Shapes(image_size=8, train_images=30, test_images=12))


def test_image_folders(tmp_path: Path) -> None:
    check_dataset(image_folder(tmp_path / "pictures"))


def test_every_registered_data_set_has_the_contract() -> None:
    assert all(issubclass(DATASETS.load(name), Dataset) for name in DATASETS.names())


class Unlimited(Dataset):
    def load(self, split: str, *, limit: int | None = None, seed: int = 0, progress: Progress | None = None) -> Split:
        return Split(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.tensor([0, 0, 1, 1]), ("a", "b"))


def test_a_data_set_that_ignores_a_limit_is_told_so() -> None:
    with pytest.raises(AssertionError, match=r"limit=2.* gives 4"):
        check_dataset(Unlimited())
