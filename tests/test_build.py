import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from qadtr_brevitas.build import build_model, build_split, build_splits, build_switchable, calibrate_on, check_classes
from qadtr_brevitas.checkpoint import load_model, save_model
from qadtr_brevitas.data.shapes import Shapes
from qadtr_brevitas.errors import CheckpointError, DataError, UsageError
from qadtr_brevitas.quant import allowed_precisions, at_precision
from qadtr_brevitas.recipe import DataSection, ModelSection, Recipe

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


def test_build_switchable_can_be_saved_and_loaded(tmp_path: Path) -> None:
    wanted = recipe(name="cifar_resnet20")
    train = build_split(wanted.data, "train", seed=0)
    model, report, info = build_switchable(wanted, train)
    calibrate_on(model.eval(), train, wanted.quant.calibration, seed=0)
    assert report.quantized_share > 0.9
    assert (info.num_classes, info.image_size, info.classes) == (3, (16, 16), train.classes)
    assert info.mean == (0.485, 0.456, 0.406)
    save_model(tmp_path / "model", model, info)
    loaded, again = load_model(tmp_path / "model")
    assert again == info
    images, _ = train.batch(torch.arange(8))
    for precision in allowed_precisions(model):
        with torch.no_grad(), at_precision(model, precision), at_precision(loaded, precision):
            assert torch.equal(model(images), loaded(images))


def test_mean_and_std_are_those_of_the_network() -> None:
    _, _, info = build_switchable(recipe(name="tf_efficientnet_lite0"), Shapes(image_size=32).load("test"))
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
    model, _, info = build_switchable(wanted, build_split(wanted.data, "train", seed=0))
    assert (info.name, info.mean) == ("cifar_resnet20", (0.1, 0.2, 0.3))
    assert torch.equal(model.get_submodule("net.conv1").weight, net.conv1.weight)


@pytest.mark.parametrize(
    ("section", "error", "message"),
    [
        ({"name": "cifar_resnet_20"}, UsageError, "unknown model 'cifar_resnet_20': did you mean cifar_resnet20 or"),
        ({"name": "qqqqqq"}, UsageError, "unknown model 'qqqqqq': see qadtr-brevitas list models"),
        ({"name": "resnet18.nonsense"}, UsageError, r"Invalid pretrained tag \(nonsense\) for resnet18.*model.name"),
        ({"name": "owner/name"}, UsageError, "Use 'hf-hub:owner/name' to load from the Hub"),
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
