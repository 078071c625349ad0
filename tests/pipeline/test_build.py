import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from qadtr_brevitas.config import DataSection, ModelSection, Recipe
from qadtr_brevitas.core.errors import CheckpointError, DataError, UsageError
from qadtr_brevitas.data.image_folder import ImageFolder
from qadtr_brevitas.data.shapes import Shapes
from qadtr_brevitas.pipeline.build import (
    build_model,
    build_split,
    build_splits,
    build_switchable,
    check_classes,
    fit_data,
)
from qadtr_brevitas.pipeline.calibration import calibrate_on
from qadtr_brevitas.pipeline.checkpoint import load_model, read_info, save_model
from qadtr_brevitas.quant import allowed_precisions, at_precision, convert
from qadtr_brevitas.quant.feature_clip import feature_clips
from qadtr_brevitas.quant.model_info import ModelInfo

SHAPES = {"name": "shapes", "image_size": 16, "classes": 3, "train_images": 60, "test_images": 30}


def data_section(**keys: Any) -> DataSection:
    return DataSection.model_validate({"dataset": SHAPES, **keys})


def recipe(**model: Any) -> Recipe:
    precision = {"schedule": "uniform", "choices": [32, 4]}
    sections = {"data": {"dataset": SHAPES}, "quant": {"precisions": [32, 4]}, "train": {"precision": precision}}
    return Recipe.model_validate({"model": model, **sections})


def test_splits_without_validation() -> None:
    train, val, test = build_splits(data_section(), seed=0)
    assert (len(train), val, len(test)) == (60, None, 30)


def test_limits_and_validation_share_are_balanced() -> None:
    splits = build_splits(data_section(train_limit=30, test_limit=6, val_share=0.2), seed=0)
    assert [part.labels.bincount().tolist() for part in splits if part] == [[8] * 3, [2] * 3, [2] * 3]


def test_a_limit_above_the_number_of_images_takes_them_all() -> None:
    assert len(build_split(data_section(train_limit=1000), "train", seed=0)) == 60


def test_the_smaller_limit_holds_and_is_the_choice_of_balanced() -> None:
    section = data_section(train_limit=20)
    everything = build_split(data_section(), "train", seed=3)
    for limit, count in ((None, 20), (12, 12), (30, 20)):
        found = build_split(section, "train", seed=3, limit=limit)
        assert torch.equal(found.images, everything.balanced(count, seed=3).images)


def test_random_weights_are_those_of_the_seed() -> None:
    wanted = recipe(name="test_resnet")
    train = build_split(wanted.data, "train", seed=0)
    found = []
    for global_seed, seed in ((1, 0), (2, 0), (1, 1)):
        torch.manual_seed(global_seed)
        model, _ = build_switchable(wanted.model_copy(update={"seed": seed}), train)
        found.append(next(model.net.parameters()).detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def grey_network(num_classes: int = 3) -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 14 * 14, num_classes)
    )


def test_a_network_of_one_channel_is_built_calibrated_saved_and_loaded(tmp_path: Path) -> None:
    wanted = recipe(name=f"{__name__}:grey_network")
    train = build_split(wanted.data, "train", seed=0)
    model, info = build_switchable(wanted, train)
    assert (info.mean, info.std) == ((0.0,), (1.0,))
    calibrate_on(model.eval(), train, wanted.quant.calibration, seed=0)
    save_model(tmp_path / "model", model, info)
    loaded, _ = load_model(tmp_path / "model")
    images, _ = train.batch(torch.arange(8))
    with torch.no_grad(), at_precision(model, 4), at_precision(loaded, 4):
        assert torch.equal(loaded(images), model(images))
        assert torch.equal(loaded(images), model(images.mean(1, keepdim=True)))


@pytest.mark.slow
def test_build_switchable_can_be_saved_and_loaded(tmp_path: Path) -> None:
    wanted = recipe(name="cifar_resnet20")
    train = build_split(wanted.data, "train", seed=0)
    model, info = build_switchable(wanted, train)
    report = model.report
    calibrate_on(model.eval(), train, wanted.quant.calibration, seed=0)
    assert report.quantized_share > 0.9
    assert (info.num_classes, info.image_size, info.classes) == (3, (16, 16), train.classes)
    assert info.mean == (0.485, 0.456, 0.406)
    assert info.data == {**SHAPES, "seed": 0}
    save_model(tmp_path / "model", model, info)
    loaded, again = load_model(tmp_path / "model")
    assert again == info
    images, _ = train.batch(torch.arange(8))
    for precision in allowed_precisions(model):
        with torch.no_grad(), at_precision(model, precision), at_precision(loaded, precision):
            assert torch.equal(model(images), loaded(images))


def test_mean_and_std_are_those_of_the_network() -> None:
    _, info = build_switchable(recipe(name="tf_efficientnet_lite0"), Shapes(image_size=32).load("test"))
    assert info.mean == info.std == (0.5, 0.5, 0.5)


def test_weights_are_loaded(tmp_path: Path) -> None:
    weights = timm.create_model("cifar_resnet20", num_classes=3).state_dict()
    save_file(weights, tmp_path / "a.safetensors")
    section = ModelSection(name="cifar_resnet20", checkpoint=str(tmp_path / "a.safetensors"))
    model = build_model(section, num_classes=3, image_size=(16, 16))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())
    with pytest.raises(CheckpointError, match="has weights for 3 classes, but 10 are needed"):
        build_model(section, num_classes=10, image_size=(16, 16))


def test_published_weights_load(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QADTR_BREVITAS_DATA", str(shared_data))
    section = ModelSection(name="cifar_resnet56", checkpoint="resnet56_cifar10.safetensors")
    build_model(section, num_classes=10, image_size=(32, 32))
    section = ModelSection(name="cifar_resnet56", checkpoint="resnet20_cifar10.safetensors")
    with pytest.raises(CheckpointError, match=r"resnet20_cifar10.safetensors does not fit cifar_resnet56"):
        build_model(section, num_classes=10, image_size=(32, 32))


def test_a_network_of_fixed_size_is_told_the_size() -> None:
    model = build_model(ModelSection(name="vit_tiny_patch16_224"), num_classes=3, image_size=(32, 32))
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 3)


def test_a_folder_that_timm_saved_can_be_given_and_forgotten(tmp_path: Path) -> None:
    net = timm.create_model("cifar_resnet20", num_classes=3)
    config = {"architecture": "cifar_resnet20", "num_classes": 3, "pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}}
    folder = tmp_path / "timm"
    folder.mkdir()
    save_file(net.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    wanted = recipe(name=f"local-dir:{folder}", pretrained=True)
    model, info = build_switchable(wanted, build_split(wanted.data, "train", seed=0))
    assert (info.name, info.mean) == ("cifar_resnet20", (0.1, 0.2, 0.3))
    assert torch.equal(model.get_submodule("net.conv1").weight, net.conv1.weight)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder of images of different sizes."""
    for number in range(4):
        for split in ("train", "test"):
            folder = tmp_path / "photos" / split / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40 + number, 50)).save(folder / f"{number}.png")
    return tmp_path / "photos"


def photo_recipe(root: Path, dataset: dict[str, Any] | None = None, **model: Any) -> Recipe:
    data = {"dataset": {"name": "image-folder", "root": str(root), **(dataset or {})}}
    return Recipe.model_validate({"model": model, "data": data})


class TestFitData:
    def test_different_sizes_become_the_one_of_the_model(self, photos: Path) -> None:
        fitted = fit_data(photo_recipe(photos, name="inception_v3"))
        assert fitted.data.dataset == ImageFolder(root=str(photos), image_size=299, crop=0.875)
        assert build_split(fitted.data, "train", seed=0).image_size == (299, 299)
        sized = fit_data(photo_recipe(photos, name="vit_tiny_patch16_224", args={"img_size": 32}))
        assert (sized.data.dataset.image_size, sized.data.dataset.crop) == (32, 0.9)

    def test_a_given_size_and_other_data_sets_are_left_alone(self, photos: Path) -> None:
        for given in (photo_recipe(photos, {"image_size": 64}, name="resnet18"), recipe(name="resnet18")):
            assert fit_data(given) is given

    def test_weights_of_a_model_directory_want_its_size(self, photos: Path, model_dir: Path) -> None:
        fitted = fit_data(photo_recipe(photos, name="cifar_resnet20", checkpoint=str(model_dir)))
        assert fitted.data.dataset.image_size == 16


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run whose model has normalization and quantizer state of its own."""
    path = tmp_path_factory.mktemp("run")
    net = timm.create_model("cifar_resnet20", num_classes=3)
    quant = {"precisions": [32, 4, "w2a8"], "norm": "switchable"}
    model = convert(net, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), image_size=(16, 16), **quant)
    info = ModelInfo(
        name="cifar_resnet20",
        args={},
        num_classes=3,
        image_size=(16, 16),
        classes=("a", "b", "c"),
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
        quant=quant,
    )
    with torch.no_grad():
        for number, value in enumerate(model.state_dict().values()):
            value.add_(number)
    save_model(path / "last", model, info)
    return path


class TestModelDirectoryAsCheckpoint:
    def test_weights_at_32_bit_and_normalization_are_taken(self, model_dir: Path) -> None:
        wanted = recipe(name="cifar_resnet20", checkpoint=str(model_dir))
        model, info = build_switchable(wanted, build_split(wanted.data, "train", seed=0))
        assert (info.mean, info.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        saved, _ = load_model(model_dir)
        images = torch.rand(4, 3, 16, 16)
        with torch.no_grad(), at_precision(saved, 32), at_precision(model.eval(), 32):
            # Its mean and std are buffers, which the fixture has changed too.
            saved.mean, saved.std = model.mean, model.std
            assert torch.equal(model(images), saved(images))

    @pytest.mark.parametrize(
        ("section", "classes", "message"),
        [
            ({"name": "cifar_resnet32"}, 3, "does not fit cifar_resnet32: they share 116 tensors, but differ in 60"),
            ({"name": "cifar_resnet8"}, 3, "does not fit cifar_resnet8: .* but differ in 72"),
            ({"name": "cifar_resnet20"}, 10, "has weights for 3 classes, but 10 are needed"),
        ],
    )
    def test_another_network_is_refused(
        self, section: dict[str, str], classes: int, message: str, model_dir: Path
    ) -> None:
        wanted = ModelSection.model_validate({**section, "checkpoint": str(model_dir)})
        with pytest.raises(CheckpointError, match=message):
            build_model(wanted, num_classes=classes, image_size=(16, 16))

    def test_without_32_bit_there_are_no_such_weights(self, model_dir: Path, tmp_path: Path) -> None:
        shutil.copytree(model_dir / "last", tmp_path / "model")
        file = tmp_path / "model" / "config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "quant": {"precisions": [8, "w32a8"]}}))
        with pytest.raises(CheckpointError, match=r"the model in .*model cannot run at 32 bit.*quant.precisions"):
            build_model(
                ModelSection(name="cifar_resnet20", checkpoint=str(tmp_path / "model")),
                num_classes=3,
                image_size=(16, 16),
            )

    def test_a_half_written_directory(self, model_dir: Path, tmp_path: Path) -> None:
        shutil.copytree(model_dir / "last", tmp_path / "model")
        (tmp_path / "model" / "config.json").unlink()
        section = ModelSection(name="cifar_resnet20", checkpoint=str(tmp_path / "model"))
        with pytest.raises(CheckpointError, match=r"has a model.safetensors but no config.json: copy both files"):
            build_model(section, num_classes=3, image_size=(16, 16))


def test_images_of_another_size_than_the_arguments_say() -> None:
    section = ModelSection(name="vit_tiny_patch16_224", args={"img_size": 64})
    message = "images are 16x16, but model.args.img_size makes .* for 64x64 only: set data.dataset.image_size=64"
    with pytest.raises(DataError, match=message):
        build_model(section, num_classes=3, image_size=(16, 16))


@pytest.mark.parametrize(
    ("section", "error", "message"),
    [
        ({"name": "cifar_resnet_20"}, UsageError, "unknown model 'cifar_resnet_20': did you mean cifar_resnet20 or"),
        ({"name": "qqqqqq"}, UsageError, "unknown model 'qqqqqq': see qadtr-brevitas list models"),
        ({"name": "resnet18.nonsense"}, UsageError, r"Invalid pretrained tag \(nonsense\) for resnet18.*model.name"),
        ({"name": "owner/name"}, UsageError, "there is no folder owner/name, .* hf-hub:owner/name for the Hugging"),
        ({"name": "local-dir:/nowhere"}, CheckpointError, "cannot fetch local-dir:/nowhere: .*check the path or"),
        ({"name": "cifar_resnet20", "args": {"dept": 3}}, UsageError, "unexpected keyword argument 'dept'.*model.args"),
        ({"name": "cifar_resnet20", "pretrained": True}, UsageError, "No pretrained weights exist for cifar_resnet20"),
        ({"name": "cifar_resnet20", "checkpoint": "no.pth"}, CheckpointError, "there is no checkpoint no.pth"),
    ],
)
def test_models_that_cannot_be_built(section: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_model(ModelSection.model_validate(section), num_classes=3, image_size=(16, 16))


def test_wrong_number_of_classes() -> None:
    wanted = recipe(name="cifar_resnet20", num_classes=10)
    train = build_split(wanted.data, "train", seed=0)
    with pytest.raises(DataError, match="the data have 3 classes, but the model has 10: use other data, or set"):
        build_switchable(wanted, train)
    check_classes(3, train)


def test_validation_leaves_some_images_to_train_on() -> None:
    with pytest.raises(DataError, match=r"data.val_share=0.999 leaves none of the 60 training images"):
        build_splits(data_section(val_share=0.999), seed=0)


class TestImagesThatOnlyChooseRanges:
    """A network with weights keeps its classes."""

    def info(self, folder: Path | None = None, images: dict[str, Any] | None = None, **model: Any) -> ModelInfo:
        wanted = recipe(name="cifar_resnet8", **({} if folder is None else {"checkpoint": str(folder)}), **model)
        section = DataSection.model_validate({"dataset": {**SHAPES, **(images or {})}})
        wanted = wanted.model_copy(update={"data": section})
        train = build_split(wanted.data, "train", seed=0)
        return build_switchable(wanted, train, only_ranges=True)[1]

    def saved(self, folder: Path) -> Path:
        wanted = recipe(name="cifar_resnet8")
        model, info = build_switchable(wanted, build_split(wanted.data, "train", seed=0))
        save_model(folder, model, info)
        return folder

    def test_published_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[int] = []

        def create(name: str, *, num_classes: int, **kwargs: Any) -> Any:
            made.append(num_classes)
            return timm.create_model(name, num_classes=num_classes)

        monkeypatch.setattr("qadtr_brevitas.pipeline.build.create_float_model", create)
        info = self.info(pretrained=True)
        assert made == [10]
        assert (info.num_classes, info.classes, info.data) == (10, tuple("0123456789"), None)

    def test_network_of_a_folder(self, tmp_path: Path) -> None:
        folder = self.saved(tmp_path / "model")
        stored = read_info(folder)
        same = self.info(folder)
        assert (same.classes, same.data) == (stored.classes, stored.data)
        other = self.info(folder, images={"classes": 2}, num_classes=3)
        assert (other.classes, other.data) == (stored.classes, stored.data)

    def test_network_without_weights_takes_the_classes_of_the_images(self) -> None:
        assert self.info(images={"classes": 2}).num_classes == 2


def test_images_of_a_model_that_are_not_square_are_not_made_so(tmp_path: Path) -> None:
    wanted = recipe(name="cifar_resnet8")
    model, info = build_switchable(wanted, build_split(wanted.data, "train", seed=0))
    save_model(tmp_path / "model", model, dataclasses.replace(info, image_size=(16, 24)))
    for number in range(8):
        folder = tmp_path / "images" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + number, 30)).save(folder / f"{number}.png")
    section = {"dataset": {"name": "image-folder", "root": str(tmp_path / "images"), "holdout": 2}}
    other = Recipe.model_validate({"model": {"checkpoint": str(tmp_path / "model")}, "data": section})
    with pytest.raises(DataError, match="is for images of 16x24, but those of the data have different sizes"):
        fit_data(other)


@pytest.mark.slow
def test_a_recipe_clips_features_with_the_thresholds_of_its_calibration() -> None:
    clipping = {"after": ["layer1"], "percentile": 50}
    wanted = recipe(name="cifar_resnet8").model_dump(mode="json")
    wanted["quant"]["feature_clip"] = clipping
    images = build_split(data_section(), "train", seed=0)
    model, info = build_switchable(Recipe.model_validate(wanted), images)
    (clip,) = feature_clips(model)
    assert info.quant["feature_clip"] == clipping
    assert min(float(threshold) for threshold in clip.buffers()) > 1e20
    calibrate_on(model, images, Recipe.model_validate(wanted).quant.calibration, seed=0)
    assert max(float(threshold) for threshold in clip.buffers()) < 1e3
    # Other models' configs do not change.
    assert "feature_clip" not in build_switchable(recipe(name="cifar_resnet8"), images)[1].quant
