"""Data sets of Hugging Face, in a folder on this disk, and the names that timm gives data sets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qadtr_brevitas.core.errors import DataError, UsageError
from qadtr_brevitas.core.registry import DATASETS
from qadtr_brevitas.data.hugging_face import HuggingFace
from qadtr_brevitas.data.shards import ShardFolder
from qadtr_brevitas.pipeline.datasets import make_dataset, parse_dataset_choice
from qadtr_brevitas.testing.datasets import check_dataset

CLASSES = ("cat", "dog")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with 6 pictures for training and 4 for validation, which `datasets` reads by itself."""
    datasets: Any = pytest.importorskip("datasets", reason="needs the package datasets of Hugging Face")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for split, count in (("train", 6), ("validation", 4)):
        for number in range(count):
            file = tmp_path / "set" / split / CLASSES[number % 2] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (20 * number, 100 * (number % 2), 7)).save(file)
    return str(tmp_path / "set")


def refusal(dataset: HuggingFace, split: str = "train") -> str:
    with pytest.raises(DataError) as caught:
        dataset.load(split)
    return str(caught.value)


@pytest.mark.parametrize("stream", [False, True])
def test_pictures_and_classes_are_those_of_the_rows(folder: str, stream: bool) -> None:
    dataset = HuggingFace(root=folder, stream=stream)
    train, test = dataset.load("train"), dataset.load("test")
    assert train.classes == CLASSES
    assert [len(train), len(test)] == [6, 4]
    assert sorted(train.images[:, 0, 0, 0].tolist()) == [20 * number for number in range(6)]
    assert (train.images[:, 1, 0, 0] // 100).tolist() == train.labels.tolist()
    assert sorted(dataset.load("train", limit=2, seed=0).labels.tolist()) == [0, 1]


def test_it_fulfills_the_contract(folder: str) -> None:
    check_dataset(HuggingFace(root=folder))


def test_what_the_data_set_does_not_have_is_named_with_what_it_has(folder: str, tmp_path: Path) -> None:
    assert "image_key to image" in refusal(HuggingFace(root=folder, image_key="picture"))
    assert "label_key to label" in refusal(HuggingFace(root=folder, label_key="class"))
    found = refusal(HuggingFace(root=folder, test_split="dev"), "test")
    assert "no split dev" in found
    assert "train, validation" in found
    assert "gone cannot be loaded" in refusal(HuggingFace(root=str(tmp_path / "gone")))


def test_without_the_package_its_name_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"needs datasets.*pip install datasets"):
        HuggingFace(root="some/set").load("train")


@pytest.mark.parametrize(
    ("name", "plugin", "root"),
    [
        ("hfds/uoft-cs/cifar10", HuggingFace, "uoft-cs/cifar10"),
        ("wds//data/imagenet", ShardFolder, "/data/imagenet"),
        ("WDS/", ShardFolder, None),
    ],
)
def test_names_of_timm_name_a_data_set_and_its_root(name: str, plugin: type, root: str | None) -> None:
    for given in ({"name": name}, parse_dataset_choice(name)):
        found = make_dataset(given)
        assert type(found) is plugin
        assert found.root == root


def test_a_root_is_given_once() -> None:
    with pytest.raises(ValueError, match="in the name already"):
        make_dataset({"name": "hfds/mnist", "root": "elsewhere"})


def test_other_names_with_a_slash_are_unknown() -> None:
    assert DATASETS.divide("tfds/mnist") == ("tfds/mnist", {})
    with pytest.raises(UsageError, match="unknown dataset 'tfds/mnist'"):
        parse_dataset_choice("tfds/mnist")
