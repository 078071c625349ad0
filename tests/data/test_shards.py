"""Tars of samples: read as files are, and every kind of damage named."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy
import pytest
import torch

from qadtr_brevitas.core.errors import DataError
from qadtr_brevitas.data.shards import ShardFolder
from qadtr_brevitas.data.streamed import StreamedSplit
from qadtr_brevitas.testing.datasets import check_dataset
from tests.data.support import picture


def write(tar: Path, first: int, *, classes: int = 2, as_json: bool = False) -> None:
    """Four samples from the number of the first on."""
    tar.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(tar, "w") as members:
        for number in range(first, first + 4):
            file = io.BytesIO()
            picture(number).save(file, format="png")
            label = json.dumps({"label": number % classes}) if as_json else str(number % classes)
            parts = {"png": file.getvalue(), "json" if as_json else "cls": label.encode()}
            for suffix, content in parts.items():
                member = tarfile.TarInfo(f"sample{number:04}.{suffix}")
                member.size = len(content)
                members.addfile(member, io.BytesIO(content))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three shards for training, one of them with JSON, and one for tests."""
    for number in range(3):
        write(tmp_path / "shards" / "train" / f"x-{number:03}.tar", 4 * number, as_json=number == 1)
    write(tmp_path / "shards" / "val" / "x-000.tar", 12)
    return tmp_path / "shards"


def dataset(root: Path, **keys: object) -> ShardFolder:
    return ShardFolder(root=str(root), **{"classes": 2, **keys})


def renamed(root: Path, names: str) -> None:
    """As many training shards as there are names, called so."""
    for tar in (root / "train").iterdir():
        tar.unlink()
    for number, name in enumerate(names.split()):
        write(root / "train" / f"{name}.tar", 4 * number)


@pytest.mark.parametrize("stream", [True, False])
def test_samples_are_read_exactly(root: Path, stream: bool) -> None:
    for _ in range(2):  # listed, and from the cache
        split = dataset(root, stream=stream).load("train")
        assert isinstance(split, StreamedSplit) is stream
        assert split.classes == ("0", "1")
        assert split.labels.tolist() == [0, 1] * 6
        for number, image in enumerate(split.images):
            assert numpy.array_equal(image.permute(1, 2, 0).numpy(), numpy.asarray(picture(number)))


@pytest.mark.parametrize("stream", [True, False])
def test_the_contract_of_data_sets_holds(root: Path, stream: bool) -> None:
    check_dataset(dataset(root, stream=stream))


def test_parts_keep_their_pictures(root: Path) -> None:
    whole = dataset(root, stream=False).load("train")
    some = dataset(root, stream=True).load("train", limit=4, seed=1)
    assert torch.equal(some.images, whole.balanced(4, seed=1).images)


def test_splits_may_stand_in_the_names_of_the_tars(root: Path) -> None:
    for folder in ("train", "val"):
        for tar in (root / folder).iterdir():
            tar.rename(root / f"set-{folder}-{tar.name}")
    assert len(dataset(root).load("train")) == 12
    assert len(dataset(root).load("test")) == 4


def test_class_names(root: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    assert dataset(root, class_names=str(names)).load("test").classes == ("cat", "dog")
    with pytest.raises(DataError, match=r"names.txt.*classes is 5"):
        dataset(root, class_names=str(names), classes=5).load("test")


def test_a_missing_shard_is_named(root: Path) -> None:
    (root / "train" / "x-001.tar").unlink()
    with pytest.raises(DataError, match=r"lacks the shard x-001.tar"):
        dataset(root).load("train")
    (root / "train" / "x-002.tar").unlink()
    with pytest.raises(DataError, match=r"1 shards.*expected_shards is 3"):
        dataset(root, expected_shards=3).load("train")


@pytest.mark.parametrize(
    ("there", "lacking"),
    [
        ("x-001 x-002", "x-000.tar: .*first_shard to 1"),
        ("x-002", "x-000.tar and 1 more: .*first_shard to 2"),
        ("x-000 x-001 y-001 y-002", "y-000.tar"),
        ("x-000 x-003", "x-001.tar and 1 more: fetch it, or rename"),
        ("x-0-of-3 x-2-of-3", "x-1-of-3.tar"),
        ("x-000-of-003 x-001-of-003", "x-002-of-003.tar"),
        ("x-001-of-003 x-002-of-003", "x-000-of-003.tar"),
        ("x-001-of-003 x-003-of-003", "x-002-of-003.tar"),
        ("x_0001_of_1024", "x_0000_of_1024.tar and 1022 more"),
    ],
)
def test_whatever_is_missing_shows_in_the_names(root: Path, there: str, lacking: str) -> None:
    renamed(root, there)
    with pytest.raises(DataError, match=rf"train lacks the shard {lacking}"):
        dataset(root).load("train")


@pytest.mark.parametrize(
    ("there", "keys"),
    [
        ("x-000 x-001 x-002", {}),
        ("x-000 y-000 y-001", {}),
        ("x-1 x-2 x-3", {"first_shard": 1}),
        ("x-1 x-2 x-3", {"expected_shards": 3}),
        ("x-08 x-09 x-10", {"first_shard": None}),
        ("train2017", {}),
        ("one other", {}),
        ("x-0-of-2 x-1-of-2", {}),
        ("x-1-of-2 x-2-of-2", {}),
        ("a-1-of-1 b-00-of-02 b-01-of-02", {}),
    ],
)
def test_names_that_lack_nothing(root: Path, there: str, keys: dict[str, object]) -> None:
    renamed(root, there)
    assert len(dataset(root, **keys).load("train")) == 4 * len(there.split())


def test_a_shard_that_does_not_belong_to_the_others_is_named(root: Path) -> None:
    renamed(root, "x-0-of-2 x-1-of-2 x-2-of-2")
    with pytest.raises(DataError, match=r"has the shard x-2-of-2.tar, but numbers of 2 end at 1"):
        dataset(root).load("train")
    renamed(root, "x-000 x-001 x-002")
    with pytest.raises(DataError, match=r"x-000.tar, but data.dataset.first_shard is 1: set it to 0"):
        dataset(root, first_shard=1).load("train")


def test_labels_beyond_the_classes_are_named(root: Path) -> None:
    write(root / "train" / "x-003.tar", 12, classes=9)
    with pytest.raises(DataError, match=r"sample0012 in .*x-003.tar has the class 3.*0 to 1.*data\.dataset\.classes"):
        dataset(root).load("train")


@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_shard_that_is_cut_off_is_named(root: Path, kept: float) -> None:
    tar = root / "train" / "x-002.tar"
    content = tar.read_bytes().rstrip(b"\0")
    tar.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(DataError, match=r"x-002.tar"):
        dataset(root).load("train")


def test_no_shards(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.*data\.dataset\.root"):
        dataset(tmp_path / "nowhere").load("train")
    (root / "val" / "x-000.tar").unlink()
    with pytest.raises(DataError, match="no shards for test"):
        dataset(root).load("test")
