"""Data sets chosen on the command line."""

from __future__ import annotations

import pytest

from qadtr_brevitas.core.errors import RecipeError, UsageError
from qadtr_brevitas.data.image_folder import Cifar10, ImageFolder
from qadtr_brevitas.pipeline.datasets import find_dataset


@pytest.mark.parametrize(
    ("choice", "dataset"),
    [
        ("cifar10", Cifar10()),
        ("image-folder:/data/my photos #1", ImageFolder(root="/data/my photos #1")),
        ("{name: image-folder, root: photos, class_order: name}", ImageFolder(root="photos", class_order="name")),
    ],
)
def test_name_with_a_root_or_with_any_settings(choice: str, dataset: ImageFolder) -> None:
    assert find_dataset([], choice) == dataset


def test_bad_choices_name_what_is_wrong() -> None:
    with pytest.raises(UsageError, match=r"cifar11.*cifar10"):
        find_dataset([], "cifar11")
    with pytest.raises(RecipeError, match=r"class_orders.*class_order"):
        find_dataset([], "{name: image-folder, class_orders: name}")
