"""Folders as they are about: names, orders, layouts and pictures that are easily misread or left out."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

import numpy
import pytest
from PIL import Image, features
from timm.data.readers.reader_image_folder import find_images_and_targets

from qadtr_brevitas.core.errors import DataError
from qadtr_brevitas.data.image_folder import Cifar10, ImageFolder
from tests.data.support import picture


def make(root: Path, *classes: str, splits: tuple[str, ...] = ("train", "test")) -> Path:
    """One image for each class in each split: its pixels are the class's number."""
    for split in splits:
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), (number, number, number)).save(root / split / name / "0.png")
    return root


def load(root: Path, split: str = "train", **settings: object):
    return ImageFolder(root=str(root), **settings).load(split)


NUMBERS = tuple(map(str, range(12)))


@pytest.mark.parametrize("names", [NUMBERS, ("class9", "class10"), ("Zebra", "apple"), ("a-2-b", "a-10-a")])
def test_classes_whose_order_is_not_clear_are_refused_with_both_orders(tmp_path: Path, names: tuple[str, ...]) -> None:
    root = make(tmp_path, *names)
    with pytest.raises(DataError, match=r"class_order=name.*class_order=natural") as refused:
        load(root)
    by_name = sorted(names)
    _, timm_index = find_images_and_targets(str(root / "train"))
    first = next(label for label, name in enumerate(by_name) if timm_index[name] != label)
    assert f"class {first} " in str(refused.value)
    assert repr(by_name[first]) in str(refused.value)
    assert load(root, class_order="name").classes == tuple(by_name)
    natural = load(root, class_order="natural")
    assert {name: label for label, name in enumerate(natural.classes)} == timm_index
    assert [names[int(image[0, 0, 0])] for image in natural.images] == list(natural.classes)


@pytest.mark.parametrize("names", [("00", "01", "10", "11"), ("cat", "dog"), ("n01440764", "n02102040"), ("A", "B")])
def test_classes_in_the_same_order_either_way_need_no_choice(tmp_path: Path, names: tuple[str, ...]) -> None:
    root = make(tmp_path, *names)
    assert load(root).classes == load(root, class_order="natural").classes == tuple(sorted(names))


@pytest.mark.parametrize("suffix", ["heic", "JP2", "tga"])
def test_pictures_that_are_not_read_are_not_left_out_silently(folder: Path, suffix: str) -> None:
    (folder / "train" / "cat" / f"photo.{suffix}").write_bytes(b"a picture")
    with pytest.raises(DataError, match=rf"cat/photo.{suffix} .*\.png"):
        load(folder)


def test_folders_inside_class_folders_belong_to_the_class(folder: Path) -> None:
    (folder / "train" / "cat" / "images").mkdir()
    picture(9).save(folder / "train" / "cat" / "images" / "9.png")
    assert load(folder).labels.tolist() == [0, 0, 0, 1, 1]


def test_layout_of_tiny_imagenet_is_explained(tmp_path: Path) -> None:
    root = make(tmp_path, "n01443537", "n01629819", splits=("train",))
    for wnid in (root / "train").iterdir():
        (wnid / "images").mkdir()
        (wnid / "0.png").rename(wnid / "images" / "0.png")
    (root / "val" / "images").mkdir(parents=True)
    picture(0).save(root / "val" / "images" / "val_0.png")
    (root / "val" / "val_annotations.txt").write_text("val_0.png n01443537")
    for split in ("train", "test"):
        with pytest.raises(DataError, match=r"val has all images in one folder.*val_annotations.txt"):
            load(root, split)
    shutil.rmtree(root / "val")
    assert len(load(root, holdout=2)) == 1


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "validation"), ("TRAIN", "Valid")])
def test_split_folders_go_by_several_names(tmp_path: Path, names: tuple[str, str]) -> None:
    root = make(tmp_path, "cat", "dog", splits=names)
    assert [len(load(root, split)) for split in ("train", "test")] == [2, 2]


def test_unicode_forms_of_one_name_are_one_class(tmp_path: Path) -> None:
    root = make(tmp_path, "caf\u00e9", splits=("train",))
    make(tmp_path, "cafe\u0301", splits=("test",))
    assert load(root, "train").classes == load(root, "test").classes == ("caf\u00e9",)
    make(tmp_path / "twice", "caf\u00e9", "cafe\u0301")
    with pytest.raises(DataError, match="Unicode"):
        load(tmp_path / "twice")


def test_names_of_files_need_not_be_utf_8_and_those_of_classes_do(folder: Path) -> None:
    odd = os.fsdecode(b"caf\xe9.png")
    os.rename(folder / "train" / "cat" / "0.png", folder / "train" / "cat" / odd)
    assert len(load(folder)) == 4
    (folder / "train" / "cat" / odd).write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"caf\\xe9.png") as refused:
        load(folder)
    str(refused.value).encode()
    os.rename(folder / "train" / "cat", folder / "train" / os.fsdecode(b"caf\xe9"))
    with pytest.raises(DataError, match=r"UTF-8.*\\udce9") as refused:
        load(folder)
    str(refused.value).encode()


def test_root_need_not_be_utf_8(folder: Path, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"\xe9")
    folder.rename(odd)
    assert len(load(odd)) == 4


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (3, 400_000)])
def test_picture_that_is_all_but_a_line_is_refused_before_it_fills_the_memory(
    folder: Path, size: tuple[int, int]
) -> None:
    Image.new("L", size).save(folder / "train" / "cat" / "0.png")
    with pytest.raises(DataError, match=rf"cat/0.png is {size[1]}x{size[0]}"):
        load(folder, image_size=224)


def test_long_pictures_are_read(folder: Path) -> None:
    Image.new("RGB", (2000, 20)).save(folder / "train" / "cat" / "0.png")
    assert load(folder, image_size=32).images.shape == (4, 3, 32, 32)


@pytest.mark.skipif(not features.check("avif"), reason="needs a Pillow that writes AVIF")
def test_damaged_picture_of_any_decoder_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "train" / "cat" / "0.jpg"
    Image.fromarray(numpy.zeros((8, 8, 3), numpy.uint8)).save(file, format="avif")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"cannot read the image .*0.jpg"):
        load(folder)
    file.unlink()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a decoder's own error")

    monkeypatch.setattr(Image, "open", fail)
    for read in (load, lambda root: ImageFolder(root=str(root)).needs_size()):
        with pytest.raises(DataError, match="a decoder's own error"):
            read(folder)


def zip_of(folder: Path, file: Path, name: str) -> Path:
    with zipfile.ZipFile(file, "w") as packed:
        for path in sorted(folder.rglob("*.png")):
            packed.write(path, f"{name}/{path.relative_to(folder)}")
        packed.writestr("__MACOSX/._0.png", b"")
    return file


def test_zip_is_read_as_a_tar_is(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = zip_of(folder, tmp_path / "images.zip", "images")
    assert load(archive).images.equal(load(folder).images)
    monkeypatch.setattr(Cifar10, "expected", {"train": 4, "test": 4})
    monkeypatch.setattr(Cifar10, "class_count", 2)
    (tmp_path / "data").mkdir()
    archive.rename(tmp_path / "data" / "cifar10.zip")
    assert len(Cifar10(root=str(tmp_path / "data")).load("test")) == 4


def test_damaged_zip_is_named(folder: Path, tmp_path: Path) -> None:
    archive = zip_of(folder, tmp_path / "images.zip", "images")
    content = bytearray(archive.read_bytes())
    content[60:70] = bytes(10)
    archive.write_bytes(content)
    with pytest.raises(DataError, match=r"images.zip .*damaged"):
        load(archive)
