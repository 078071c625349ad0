import io
import multiprocessing
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from qadtr_brevitas.core.errors import DataError, UsageError
from qadtr_brevitas.data import decode
from qadtr_brevitas.data.archives import unpack
from qadtr_brevitas.data.image_folder import Cifar10, ImageFolder
from tests.data.support import picture, tar_of


def small_cifar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cifar10, "expected", {"train": 4, "test": 4})
    monkeypatch.setattr(Cifar10, "class_count", 2)


def test_images_are_read_exactly_and_classes_are_sorted(folder: Path) -> None:
    split = ImageFolder(root=str(folder)).load("test")
    assert split.classes == ("cat", "dog")
    assert split.labels.tolist() == [0, 0, 1, 1]
    assert split.images.dtype == torch.uint8
    for number, image in enumerate(split.images):
        assert numpy.array_equal(image.permute(1, 2, 0).numpy(), numpy.asarray(picture(4 + number)))


def test_val_serves_as_test(folder: Path) -> None:
    (folder / "test").rename(folder / "val")
    assert len(ImageFolder(root=str(folder)).load("test")) == 4


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG", "webp", "bmp", "tif", "TIFF", "gif", "ppm", "jfif"])
def test_file_types(folder: Path, suffix: str) -> None:
    for file in (folder / "train").rglob("*.png"):
        Image.open(file).convert("L").save(file.with_suffix(f".{suffix}.tmp"), format=_format(suffix))
        file.unlink()
        file.with_suffix(f".{suffix}.tmp").rename(file.with_suffix(f".{suffix}"))
    (folder / "train" / "cat" / "notes.txt").write_text("no image")
    split = ImageFolder(root=str(folder)).load("train")
    assert split.images.shape == (4, 3, 8, 8)
    assert torch.equal(split.images[:, 0], split.images[:, 2])


def _format(suffix: str) -> str:
    return {"jpg": "jpeg", "jfif": "jpeg", "tif": "tiff"}.get(suffix, suffix.lower())


def test_progress_reaches_the_end(folder: Path) -> None:
    told: list[tuple[int, int]] = []
    ImageFolder(root=str(folder)).load("train", progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (4, 4)


@pytest.mark.parametrize(("size", "shape"), [(8, (8, 8)), (16, (16, 16))])
def test_image_size_resizes_and_crops_the_center(folder: Path, size: int, shape: tuple[int, int]) -> None:
    wide = Image.new("RGB", (24, 8), "red")
    wide.paste(Image.new("RGB", (8, 8), "blue"), (8, 0))
    wide.save(folder / "train" / "cat" / "0.png")
    images = ImageFolder(root=str(folder), image_size=size).load("train").images
    assert images.shape[2:] == shape
    assert images[0, 2].float().mean() > 220
    if size == 8:
        assert numpy.array_equal(images[1].permute(1, 2, 0).numpy(), numpy.asarray(picture(1)))


def test_mixed_sizes_need_an_image_size(folder: Path) -> None:
    picture(0, (10, 12)).save(folder / "train" / "dog" / "1.png")
    with pytest.raises(DataError, match=r"dog/1.png.*10x12.*8x8.*data.dataset.image_size"):
        ImageFolder(root=str(folder)).load("train")


def test_grays_of_16_bit_keep_their_upper_byte(folder: Path) -> None:
    grays = numpy.random.default_rng(0).integers(0, 65536, (8, 8), dtype=numpy.uint16)
    Image.fromarray(grays).save(folder / "train" / "cat" / "0.png")
    image = ImageFolder(root=str(folder)).load("train").images[0]
    assert all(numpy.array_equal(channel.numpy(), grays >> 8) for channel in image)


def test_grays_whose_range_is_not_known_are_refused(folder: Path) -> None:
    Image.fromarray(numpy.ones((8, 8), numpy.float32)).save(folder / "train" / "cat" / "0.png", format="tiff")
    with pytest.raises(DataError, match=r"cat/0.png.*32 bit.*8 or 16 bit"):
        ImageFolder(root=str(folder)).load("train")


def test_what_macos_adds_to_archives_is_no_class(folder: Path) -> None:
    (folder / "train" / "__MACOSX").mkdir()
    assert ImageFolder(root=str(folder)).load("train").classes == ("cat", "dog")


@pytest.mark.parametrize("content", [b"", b"no image at all", "half"])
@pytest.mark.parametrize("name", ["cat/0.png", "dog/1.png"])
def test_a_corrupt_image_is_named(folder: Path, name: str, content: bytes | str) -> None:
    file = folder / "train" / name
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
    with pytest.raises(DataError, match=rf"cannot read .*{name}"):
        ImageFolder(root=str(folder)).load("train")


def test_unknown_split(folder: Path) -> None:
    with pytest.raises(UsageError, match="unknown split 'validation': choose from train, test"):
        ImageFolder(root=str(folder)).load("validation")


def test_missing_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"nowhere.*data.dataset.root"):
        ImageFolder(root=str(tmp_path / "nowhere")).load("train")
    with pytest.raises(DataError, match=r"data.dataset.root or QADTR_BREVITAS_DATA.*cifar10"):
        Cifar10().load("train")
    monkeypatch.setenv("QADTR_BREVITAS_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"nowhere.*QADTR_BREVITAS_DATA.*cifar10"):
        Cifar10().load("train")


def test_folder_without_the_split(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty.*train.*ROOT/\{train,test\}"):
        ImageFolder(root=str(tmp_path / "empty")).load("train")
    (folder / "test").rename(folder / "other")
    with pytest.raises(DataError, match="has no folder test or val"):
        ImageFolder(root=str(folder)).load("test")


def test_empty_folders(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match=r"train is empty: images must lie in"):
        ImageFolder(root=str(tmp_path / "empty")).load("train")
    for split in ("train", "test"):
        (folder / split / "fox").mkdir()
    with pytest.raises(DataError, match=r"fox has no images \(.png, .jpg,.*\.tif"):
        ImageFolder(root=str(folder)).load("train")


def test_splits_with_different_classes(folder: Path) -> None:
    (folder / "test" / "cat").rename(folder / "test" / "fox")
    with pytest.raises(DataError, match=r"other classes for train than for test \(cat, fox\)"):
        ImageFolder(root=str(folder)).load("train")


@pytest.mark.parametrize("by", ["root", "variable", "tar", "tar beside"])
def test_where_cifar10_is_found(by: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_cifar(monkeypatch)
    data = tmp_path / "data"
    data.mkdir()
    root: Path | None = None
    if by == "variable":
        folder.rename(data / "cifar10")
        monkeypatch.setenv("QADTR_BREVITAS_DATA", str(data))
    elif by == "root":
        root = folder
    else:
        archive = tar_of(folder, data / "cifar10.tar", "cifar10")
        root = archive if by == "tar" else data
    assert len(Cifar10(root=None if root is None else str(root)).load("train")) == 4


def test_cifar10_has_so_many_classes_and_images(folder: Path) -> None:
    message = "2 classes and 4 images.*10 and 50000.*image-folder"
    with pytest.raises(DataError, match=message):
        Cifar10(root=str(folder)).load("train")


@pytest.mark.slow
def test_the_real_cifar10(cifar10_root: Path) -> None:
    test = Cifar10(root=str(cifar10_root)).load("test")
    assert test.images.shape == (10_000, 3, 32, 32)
    assert test.classes[0] == "airplane"
    assert test.labels.bincount().tolist() == [1000] * 10


def test_a_tar_is_unpacked_once(folder: Path, tmp_path: Path, cache: Path) -> None:
    archive = tar_of(folder, tmp_path / "images.tar", "images")
    first = unpack(archive)
    assert (first / "images" / "train").is_dir()
    (first / "mark").touch()
    assert (unpack(archive) / "mark").exists()
    assert [entry.name for entry in (cache / "unpacked").iterdir()] == [first.name]


@pytest.mark.slow
def test_two_processes_may_unpack_at_once(folder: Path, tmp_path: Path, cache: Path) -> None:
    archive = tar_of(folder, tmp_path / "images.tar", "images")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.map(unpack, [archive, archive])
    assert results[0] == results[1]
    assert len(list(results[0].rglob("*.png"))) == 8
    assert len(list((cache / "unpacked").iterdir())) == 1


def test_the_second_of_two_unpackers_takes_the_result_of_the_first(
    folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tar_of(folder, tmp_path / "images.tar", "images")
    rename = os.rename

    def lose_the_race(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        unpack(archive)
        rename(source, target)

    monkeypatch.setattr(os, "rename", lose_the_race)
    assert (unpack(archive) / "images").is_dir()
    assert len(list((cache / "unpacked").iterdir())) == 1


def _escaping(file: Path) -> None:
    with tarfile.open(file, "w") as tar:
        member = tarfile.TarInfo("../outside.txt")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"out"))


@pytest.mark.parametrize(
    "write",
    [
        lambda file: file.write_bytes(b"no tar"),
        lambda file: file.write_bytes(file.read_bytes()[:5000]),
        _escaping,
    ],
    ids=["no tar", "truncated", "escaping"],
)
def test_bad_tars(write: Callable[[Path], object], folder: Path, tmp_path: Path, cache: Path) -> None:
    archive = tar_of(folder, tmp_path / "images.tar", "images")
    write(archive)
    with pytest.raises(DataError, match=r"images.tar .*damaged"):
        ImageFolder(root=str(archive)).load("train")
    assert not (cache / "outside.txt").exists()
    assert not list((cache / "unpacked").iterdir())


def test_no_space_to_unpack(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tar_of(folder, tmp_path / "images.tar", "images")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "extractall", full)
    with pytest.raises(DataError, match=r"No space left on device.*XDG_CACHE_HOME"):
        unpack(archive)


@pytest.mark.usefixtures("always_cached")
def test_decoded_images_are_kept(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = ImageFolder(root=str(folder))
    first = dataset.load("train")
    monkeypatch.setattr(decode, "_decode_chunk", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(dataset.load("train").images, first.images)
    assert len(list((cache / "decoded").iterdir())) == 1


@pytest.mark.usefixtures("always_cached")
def test_processes_of_torchrun_share_decoded_images(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = ImageFolder(root=str(folder))
    alone = dataset.load("train").images
    monkeypatch.setenv("WORLD_SIZE", "2")
    (file,) = (cache / "decoded").iterdir()
    assert isinstance(decode._read_cache(file, tuple(alone.shape)), numpy.memmap)
    shared = dataset.load("train").images
    assert torch.equal(shared, alone)
    # Changes stay in the process that makes them.
    shared.zero_()
    assert torch.equal(dataset.load("train").images, alone)


@pytest.mark.usefixtures("always_cached")
@pytest.mark.parametrize("change", ["new image", "other pixels", "damaged cache", "other size"])
def test_stale_caches_are_not_used(folder: Path, cache: Path, change: str) -> None:
    dataset = ImageFolder(root=str(folder))
    before = dataset.load("train").images
    if change == "new image":
        picture(99).save(folder / "train" / "dog" / "9.png")
    elif change == "other pixels":
        picture(99).save(folder / "train" / "dog" / "1.png")
    elif change == "other size":
        dataset = ImageFolder(root=str(folder), image_size=16)
    else:
        next((cache / "decoded").iterdir()).write_bytes(b"\x93NUMPY")
    after = dataset.load("train").images
    assert torch.equal(before, after) == (change == "damaged cache")
    assert len(list((cache / "decoded").iterdir())) == (2 if change == "other size" else 1)


@pytest.mark.usefixtures("always_cached")
def test_a_cache_that_cannot_be_written_does_not_matter(folder: Path, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("in the way")
    assert len(ImageFolder(root=str(folder)).load("train")) == 4
