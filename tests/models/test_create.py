import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import AlexNet_Weights, GoogLeNet_Weights

from qadtr_brevitas.core.errors import CheckpointError, UsageError
from qadtr_brevitas.models.create import (
    create_float_model,
    fixed_size_args,
    is_model_name,
    model_config,
    model_names,
    own_image_size,
)
from qadtr_brevitas.models.torchvision_models import torchvision_names


def test_torchvision_fills_in_what_timm_lacks() -> None:
    names = torchvision_names()
    assert {"alexnet", "googlenet", "squeezenet1_0"} <= set(names)
    assert not set(names) & set(timm.list_models())
    listed = model_names()
    assert (listed["alexnet"], listed["resnet18"], listed["cifar_resnet20"]) == ("torchvision", "timm", "timm")
    assert list(model_names("alex*")) == ["alexnet"]


@pytest.mark.parametrize(
    ("name", "first", "classifier"),
    [
        ("alexnet", "features.0", "classifier.6"),
        ("googlenet", "conv1.conv", "fc"),
        ("squeezenet1_1", "features.0", "classifier.1"),
        ("mnasnet0_5", "layers.0", "classifier.1"),
        ("shufflenet_v2_x0_5", "conv1.0", "fc"),
        ("mobilenet_v3_small", "features.0.0", "classifier.3"),
    ],
)
def test_a_torchvision_network_is_configured_as_timms_are(name: str, first: str, classifier: str) -> None:
    net = create_float_model(name, num_classes=3).eval()
    config: dict[str, Any] = net.pretrained_cfg
    assert (config["architecture"], config["first_conv"], config["classifier"]) == (name, first, classifier)
    assert (config["mean"], config["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    resolved = timm.data.resolve_data_config({}, model=net)
    assert resolved["input_size"] == (3, 224, 224)
    assert resolved["crop_pct"] in (0.875, 224 / 232)
    with torch.no_grad():
        assert net(torch.rand(1, 3, 224, 224)).shape == (1, 3)
    # No heads that only training uses, whose output would be no tensor.
    assert isinstance(net.train()(torch.rand(2, 3, 96, 96)), torch.Tensor)


def test_networks_of_one_size_are_told_the_size() -> None:
    assert fixed_size_args("vit_b_16", (64, 64)) == {"image_size": 64}
    assert fixed_size_args("maxvit_t", (64, 64)) == {"input_size": (64, 64)}
    assert fixed_size_args("alexnet", (64, 64)) == {}
    assert fixed_size_args("vit_tiny_patch16_224", (64, 64)) == {"img_size": (64, 64)}
    assert fixed_size_args("resnet18", (64, 64)) == {}


@pytest.fixture
def timm_folder(tmp_path: Path) -> str:
    """Return the folder of a small transformer that timm saved."""
    net = timm.create_model("test_vit", num_classes=3)
    config = {"input_size": [3, 160, 160], "fixed_input_size": True, "crop_pct": 0.9}
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "test_vit", "num_classes": 3, "pretrained_cfg": config})
    )
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    return f"local-dir:{tmp_path}"


def test_a_folder_of_timm_says_its_size(timm_folder: str) -> None:
    assert own_image_size(timm_folder, {}) == (160, 0.9)
    assert fixed_size_args(timm_folder, (32, 32)) == {"img_size": (32, 32)}
    net = create_float_model(timm_folder, num_classes=3, pretrained=True, args={"img_size": (32, 32)})
    assert net(torch.rand(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize(
    ("name", "args", "size"),
    [
        ("resnet18", {}, (224, 0.95)),
        ("convnext_base.fb_in22k_ft_in1k_384", {}, (384, 1.0)),
        ("inception_v3", {}, (299, 0.875)),
        ("vit_tiny_patch16_224", {"img_size": 64}, (64, 0.9)),
        ("vit_tiny_patch16_224", {"img_size": [48, 64]}, (48, 0.9)),
        ("alexnet", {}, (224, 0.875)),
        ("vit_b_16", {"image_size": 64}, (64, 0.875)),
    ],
)
def test_own_image_size(name: str, args: dict[str, Any], size: tuple[int, float]) -> None:
    assert own_image_size(name, args) == size


def fake_download(monkeypatch: pytest.MonkeyPatch, weights: Any, state: dict[str, torch.Tensor]) -> list[Any]:
    """Lets torchvision "fetch" a state dict; returns where the arguments of the download will be."""
    asked: list[Any] = []

    def fetch(self: Any, **settings: Any) -> dict[str, torch.Tensor]:
        asked.append(settings)
        return state

    monkeypatch.setattr(type(weights), "get_state_dict", fetch)
    return asked


@pytest.mark.slow
def test_pretrained_weights_of_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    published = create_float_model("alexnet", num_classes=1000).state_dict()
    asked = fake_download(monkeypatch, AlexNet_Weights.DEFAULT, published)
    net = create_float_model("alexnet", num_classes=1000, pretrained=True)
    assert all(torch.equal(value, published[key]) for key, value in net.state_dict().items())
    # Nothing downloaded is unpickled.
    assert asked == [{"progress": False, "check_hash": True, "weights_only": True}]
    other = create_float_model("alexnet", num_classes=3, pretrained=True).state_dict()
    assert [key for key in published if not torch.equal(other[key], published[key])] == [
        "classifier.6.weight",
        "classifier.6.bias",
    ]


def test_heads_for_training_are_left_out_of_pretrained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    net = create_float_model("googlenet", num_classes=1000)
    published = {key: torch.ones_like(value) for key, value in net.state_dict().items()}
    fake_download(monkeypatch, GoogLeNet_Weights.DEFAULT, {**published, "aux1.fc1.weight": torch.zeros(2)})
    net = create_float_model("googlenet", num_classes=1000, pretrained=True)
    assert all(bool((value == 1).all()) for value in net.state_dict().values())
    assert isinstance(net, nn.Module)


def test_no_network_to_fetch_weights_from(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, **settings: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(AlexNet_Weights, "get_state_dict", fail)
    with pytest.raises(CheckpointError, match=r"cannot fetch alexnet: Name or service not known; check .* the network"):
        create_float_model("alexnet", num_classes=3, pretrained=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alexnett", "unknown model 'alexnett': did you mean alexnet"),
        ("googlnet", "did you mean googlenet"),
        ("runs/nowhere", r"there is no folder runs/nowhere, and no model of that name: .*hf-hub:runs/nowhere"),
        ("resnet18.nonsense", r"Invalid pretrained tag \(nonsense\)"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    for use in (lambda: create_float_model(name, num_classes=3), lambda: model_config(name)):
        with pytest.raises(UsageError, match=message):
            use()
    assert is_model_name(name) == (name == "resnet18.nonsense")


def test_an_argument_that_torchvision_refuses() -> None:
    with pytest.raises(UsageError, match=r"torchvision cannot make the model 'alexnet' \(.*'depth'.*model.args"):
        create_float_model("alexnet", num_classes=3, args={"depth": 3})
