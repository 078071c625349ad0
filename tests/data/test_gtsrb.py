from __future__ import annotations

import shutil
from pathlib import Path

import numpy
import pytest
from pydantic import ValidationError

from qadtr_brevitas.core.errors import DataError
from qadtr_brevitas.data.gtsrb import SIGNS, Gtsrb
from qadtr_brevitas.testing.datasets import check_dataset
from tests.data.support import picture, tar_of


def class_folders(folder: Path, *, digits: int, suffix: str, size: tuple[int, int] = (8, 9)) -> Path:
    for label in range(43):
        (folder / f"{label:0{digits}}").mkdir(parents=True)
        for number in range(2):
            picture(label, size).save(folder / f"{label:0{digits}}" / f"0000{number}.{suffix}")
    return folder


def final_test(root: Path, table: Path) -> None:
    images = root / "Final_Test" / "Images"
    images.mkdir(parents=True)
    lines = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for number in range(86):
        picture(number).save(images / f"{number:05}.ppm")
        lines.append(f"{number:05}.ppm;8;8;1;1;7;7;{42 - number % 43}")
    table.write_text("\n".join(lines) + "\n")


@pytest.fixture
def official(tmp_path: Path) -> Path:
    root = tmp_path / "official" / "GTSRB"
    training = class_folders(root / "Final_Training" / "Images", digits=5, suffix="ppm")
    (training / "00000" / "GT-00000.csv").write_text("Filename;ClassId\n")
    final_test(root, root / "GT-final_test.csv")
    return root


def test_there_are_43_different_signs() -> None:
    assert len(set(SIGNS)) == 43
    # Known numbers of the published class list.
    assert (SIGNS[0], SIGNS[14], SIGNS[17], SIGNS[33], SIGNS[42]) == (
        "speed limit 20",
        "stop",
        "no entry",
        "turn right",
        "end of no passing for trucks",
    )


@pytest.mark.parametrize("inner", ["", "GTSRB"], ids=["itself", "the folder that holds it"])
def test_the_published_layout(official: Path, inner: str) -> None:
    dataset = Gtsrb(root=str(official.parent if inner else official), image_size=8)
    train, test = dataset.load("train"), dataset.load("test")
    assert train.classes == test.classes == SIGNS
    assert train.labels.tolist() == [label for label in range(43) for _ in range(2)]
    # The table says of which class a test image is: the first image is of the last class.
    assert numpy.array_equal(test.images[-2].permute(1, 2, 0).numpy(), numpy.asarray(picture(0)))
    assert test.labels.bincount().tolist() == [2] * 43


def test_torchvisions_layout(tmp_path: Path) -> None:
    root = tmp_path / "gtsrb"
    class_folders(root / "GTSRB" / "Training", digits=5, suffix="ppm")
    final_test(root / "GTSRB", root / "GT-final_test.csv")
    for place in (tmp_path, root, root / "GTSRB"):
        assert len(Gtsrb(root=str(place)).load("test")) == 86


def test_class_folders_and_a_tar_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gtsrb32"
    for split in ("train", "test"):
        class_folders(folder / split, digits=2, suffix="webp", size=(32, 32))
    check_dataset(Gtsrb(root=str(folder)))
    (tmp_path / "data").mkdir()
    tar_of(folder, tmp_path / "data" / "gtsrb32-small.tar", "gtsrb32")
    shutil.rmtree(folder)
    monkeypatch.setenv("QADTR_BREVITAS_DATA", str(tmp_path / "data"))
    assert len(Gtsrb().load("train")) == 86
    assert len(Gtsrb(root=str(tmp_path / "data" / "gtsrb32-small.tar")).load("train")) == 86


def test_a_missing_class_is_named(official: Path) -> None:
    shutil.rmtree(official / "Final_Training" / "Images" / "00014")
    with pytest.raises(DataError, match=r"14 \(stop\).*43 classes"):
        Gtsrb(root=str(official)).load("train")


def test_what_does_not_belong_there_is_told(official: Path) -> None:
    (official / "Final_Test" / "Images" / "00003.ppm").unlink()
    with pytest.raises(DataError, match=r"lacks 00003\.ppm.*GT-final_test\.csv"):
        Gtsrb(root=str(official)).load("test")
    (official / "GT-final_test.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"GT-final_test\.csv.*Filename and ClassId"):
        Gtsrb(root=str(official)).load("test")
    (official / "GT-final_test.csv").unlink()
    with pytest.raises(DataError, match=r"GTSRB_Final_Test_GT\.zip"):
        Gtsrb(root=str(official)).load("test")
    (official / "Final_Training" / "Images" / "stop").mkdir()
    with pytest.raises(DataError, match=r"'stop'.*00 to 42"):
        Gtsrb(root=str(official)).load("train")
    with pytest.raises(DataError, match=r"no GTSRB in .*Final_Training/Images"):
        Gtsrb(root=str(official / "Final_Test" / "Images")).load("train")
    with pytest.raises(ValidationError, match="leave holdout out"):
        Gtsrb(root=str(official), holdout=5)


def test_the_sample_of_the_real_data(shared_data: Path) -> None:
    tar = shared_data / "gtsrb32-small.tar"
    if not tar.exists():
        pytest.skip("needs gtsrb32-small.tar")
    train, test = (Gtsrb(root=str(tar)).load(split, limit=43) for split in ("train", "test"))
    assert (train.available, test.available) == (6_535, 6_315)
    assert train.labels.tolist() == list(range(43))
