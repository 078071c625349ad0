"""Image folders with one split or none, brought to a size as timm does it, and read only in part."""

from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from qadtr_brevitas.core.errors import DataError, UsageError
from qadtr_brevitas.data.archives import unpack
from qadtr_brevitas.data.image_folder import Cifar10, ImageFolder
from qadtr_brevitas.data.streamed import StreamedSplit
from tests.data.support import picture, tar_of


def timm_pixels(file: Path, *, image_size: int, crop: float) -> numpy.ndarray:
    """Return an image as timm's own evaluation transform makes it, uint8 (3, H, W)."""
    transform = create_transform((3, image_size, image_size), interpolation="bicubic", crop_pct=crop, normalize=False)
    return numpy.asarray(transform(Image.open(file).convert("RGB")))


@pytest.mark.parametrize("crop", [1.0, 0.95, 0.875, 0.9])
@pytest.mark.parametrize("size", [(40, 61), (61, 40), (24, 24), (20, 90), (27, 31)])
def test_size_and_crop_are_those_of_timm(folder: Path, crop: float, size: tuple[int, int]) -> None:
    file = folder / "train" / "cat" / "0.png"
    picture(5, size).save(file)
    images = ImageFolder(root=str(folder), image_size=24, crop=crop).load("train").images
    assert numpy.array_equal(images[0].numpy(), timm_pixels(file, image_size=24, crop=crop))


def test_real_photos_are_read_as_timm_reads_them(shared_data: Path) -> None:
    archive = shared_data / "imagenet1k-sample.tar"
    if not archive.is_file():
        pytest.skip(f"needs {archive}")
    dataset = ImageFolder(root=str(archive), image_size=224, crop=0.875, holdout=100)
    split = dataset.load("test", limit=4)
    assert (len(split), split.available, len(split.classes)) == (4, 10, 1000)
    files = sorted((unpack(archive) / "imagenet1k-sample" / "val").glob("*/*"))
    for image, label in zip(split.images, split.labels.tolist(), strict=True):
        assert label % 100 == 0
        assert numpy.array_equal(image.numpy(), timm_pixels(files[label], image_size=224, crop=0.875))


def test_a_crop_needs_a_size(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"crop=0.9 .*data.dataset.image_size"):
        ImageFolder(root=str(folder), crop=0.9).load("train")


class TestOnlyWhatIsUsedIsRead:
    @pytest.mark.parametrize("seed", [0, 1])
    def test_the_choice_is_that_of_balanced(self, folder: Path, seed: int) -> None:
        for number in range(8, 14):
            picture(number).save(folder / "train" / "dog" / f"{number}.png")
        dataset = ImageFolder(root=str(folder))
        everything, some = dataset.load("train"), dataset.load("train", limit=5, seed=seed)
        assert torch.equal(some.images, everything.balanced(5, seed=seed).images)
        assert torch.equal(some.labels, everything.balanced(5, seed=seed).labels)
        assert (len(some), some.available, everything.available) == (5, 10, 10)

    def test_the_others_are_not_opened(self, folder: Path) -> None:
        dataset = ImageFolder(root=str(folder), image_size=8)
        chosen = dataset.load("train", limit=2)
        everything = dataset.load("train").images
        for number, file in enumerate(sorted((folder / "train").rglob("*.png"))):
            if not any(torch.equal(everything[number], image) for image in chosen.images):
                file.write_bytes(b"no image at all")
        assert torch.equal(dataset.load("train", limit=2).images, chosen.images)
        with pytest.raises(DataError, match="cannot read the image"):
            dataset.load("train")

    def test_a_limit_above_the_number_of_images_takes_them_all(self, folder: Path) -> None:
        split = ImageFolder(root=str(folder)).load("train", limit=5)
        assert (len(split), split.available) == (4, 4)

    def test_memory_is_counted_for_what_is_used(self, folder: Path) -> None:
        assert not isinstance(ImageFolder(root=str(folder), max_gb=5e-7).load("train", limit=2), StreamedSplit)
        assert isinstance(ImageFolder(root=str(folder), max_gb=5e-7).load("train", limit=3), StreamedSplit)


class TestHoldout:
    """All images in one place."""

    @pytest.fixture(params=["train", "val", ""])
    def single(self, folder: Path, request: pytest.FixtureRequest) -> Path:
        """Five cats and four dogs, in one split folder or in ROOT itself."""
        (folder / "test").rename(folder.parent / "elsewhere")
        for number in range(4, 9):
            picture(number).save(folder / "train" / ("cat" if number < 7 else "dog") / f"{number}.png")
        if request.param == "":
            for place in sorted((folder / "train").iterdir()):
                place.rename(folder / place.name)
            (folder / "train").rmdir()
        else:
            (folder / "train").rename(folder / request.param)
        return folder

    def test_every_so_many_th_image_of_the_whole_listing_is_for_testing(self, single: Path) -> None:
        dataset = ImageFolder(root=str(single), holdout=4)
        train, test = dataset.load("train"), dataset.load("test")
        assert train.classes == test.classes == ("cat", "dog")
        assert test.labels.tolist() == [0, 0, 1]
        assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
        found = [image.permute(1, 2, 0).numpy() for image in test.images]
        assert all(numpy.array_equal(x, numpy.asarray(picture(n))) for x, n in zip(found, (0, 6, 8), strict=True))
        assert not any(torch.equal(x, y) for x in train.images for y in test.images)

    def test_it_is_asked_for(self, single: Path) -> None:
        absent = "test" if (single / "train").is_dir() else "train"
        with pytest.raises(DataError, match=r"data.dataset.holdout=5"):
            ImageFolder(root=str(single)).load(absent)

    def test_a_holdout_is_made_where_a_split_is_needed_that_is_not_there(self, single: Path) -> None:
        there = next((name for name in ("train", "val", "test") if (single / name).is_dir()), None)
        for needed in (["train"], ["test"], ["train", "test"]):
            dataset, decision = ImageFolder(root=str(single)).completed(needed)
            is_whole = needed == ["train"] if there == "train" else there is not None and needed == ["test"]
            assert (dataset.holdout, decision is None) == ((None, True) if is_whole else (5, False))
            assert sum(len(dataset.load(split)) for split in needed) in (2, 7, 9)
        own = ImageFolder(root=str(single), holdout=4)
        assert own.completed(["train", "test"]) == (own, None)

    def test_a_tar_of_class_folders(self, single: Path, tmp_path: Path) -> None:
        archive = tar_of(single, tmp_path / "photos.tar", "photos")
        assert len(ImageFolder(root=str(archive), holdout=4).load("test")) == 3

    @pytest.mark.usefixtures("always_cached")
    def test_each_part_has_a_cache_of_its_own(self, single: Path, cache: Path) -> None:
        dataset = ImageFolder(root=str(single), holdout=4)
        for _ in range(2):
            assert [len(dataset.load(split)) for split in ("train", "test")] == [6, 3]
            assert len(dataset.load("train", limit=2)) == 2
        assert len(list((cache / "decoded").iterdir())) == 3


def test_nothing_is_held_out_of_two_splits_or_of_nothing(folder: Path) -> None:
    for dataset in (
        ImageFolder(root=str(folder)),
        ImageFolder(root=str(folder / "nowhere")),
        Cifar10(root=str(folder)),
    ):
        assert dataset.completed(["train", "test"]) == (dataset, None)


def test_a_holdout_of_two_splits_is_refused(folder: Path) -> None:
    message = r"train and test.*holdout=5.*null"
    with pytest.raises(DataError, match=message):
        ImageFolder(root=str(folder), holdout=5).load("train")


def test_images_of_different_sizes_need_the_size_and_crop_of_a_model(folder: Path) -> None:
    dataset = ImageFolder(root=str(folder))
    assert not dataset.needs_size()
    picture(0, (10, 12)).save(folder / "train" / "dog" / "1.png")
    assert dataset.needs_size()
    assert not ImageFolder(root=str(folder), image_size=16).needs_size()
    assert dataset.fitted(224, 0.875) == ImageFolder(root=str(folder), image_size=224, crop=0.875)
    assert ImageFolder(root=str(folder), crop=0.5).fitted(224, 0.875).crop == 0.5
