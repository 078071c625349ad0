from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import qadtr_brevitas.models
from qadtr_brevitas.data.image_folder import Cifar10

RESNETS = [f"cifar_resnet{depth}{kind}" for depth in (20, 32, 44, 56, 110) for kind in ("", "b")]
VGGS = ["cifar_vgg16", "cifar_vgg19"]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("cifar_resnet20", 269_722),
        ("cifar_resnet32", 464_154),
        ("cifar_resnet44", 658_586),
        ("cifar_resnet56", 853_018),
        ("cifar_resnet110", 1_727_962),
        # Two 1x1 convolutions and their norms more: 16*32 + 32*64 + 2*32 + 2*64.
        ("cifar_resnet20b", 269_722 + 2_752),
        ("cifar_vgg16", 14_724_042),
        ("cifar_vgg19", 20_035_018),
    ],
)
def test_number_of_parameters(name: str, parameters: int) -> None:
    assert sum(p.numel() for p in timm.create_model(name).parameters()) == parameters


@pytest.mark.parametrize("name", [*RESNETS, *VGGS])
def test_registered_with_timm_and_its_conventions(name: str) -> None:
    assert name in timm.list_models("cifar_*")
    model = timm.create_model(name, num_classes=3).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        features = model.forward_features(images)
        assert torch.equal(model.forward_head(features), model(images))
        assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
        assert model(images).shape == (2, 3)
    assert model.pretrained_cfg["architecture"] == name
    assert model.get_submodule(model.pretrained_cfg["classifier"]) is model.get_classifier()
    assert isinstance(model.get_submodule(model.pretrained_cfg["first_conv"]), nn.Conv2d)


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_resnet20b", "cifar_vgg16"])
def test_every_relu_is_used_once_and_not_in_place(name: str) -> None:
    model = timm.create_model(name).eval()
    calls: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            assert not module.inplace
            module.register_forward_hook(lambda module, *_: calls.append(module))
    model(torch.rand(1, 3, 32, 32))
    assert len(calls) == len(set(calls)) == sum(isinstance(module, nn.ReLU) for module in model.modules())


def test_option_a_shortcut_takes_every_second_pixel_and_pads_channels_with_zeros() -> None:
    shortcut = timm.create_model("cifar_resnet20").layer2[0].shortcut
    x = torch.rand(2, 16, 8, 8)
    out = shortcut(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert out[:, :8].abs().sum() == out[:, 24:].abs().sum() == 0
    assert not list(shortcut.parameters())


def test_reset_classifier() -> None:
    model = timm.create_model("cifar_resnet20")
    model.reset_classifier(7, global_pool="avg")
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 7)
    model.reset_classifier(0)
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 64)
    with pytest.raises(ValueError, match="global_pool='max' is not possible here: leave it out, or give 'avg'"):
        model.reset_classifier(7, global_pool="max")


def test_a_depth_that_is_not_6n_plus_2_is_refused() -> None:
    with pytest.raises(ValueError, match="depth 21 is not possible: a CIFAR ResNet has 6n\\+2 layers"):
        qadtr_brevitas.models.CifarResNet(21)


@pytest.mark.slow
# ResNet-56 takes three times as long, so it classifies 100 images of each class: the images are sorted by class.
@pytest.mark.parametrize(("depth", "every", "correct"), [(20, 1, 9173), (56, 10, 939)])
def test_published_weights_classify_the_known_number_of_images(
    depth: int, every: int, correct: int, shared_data: Path, cifar10_root: Path
) -> None:
    model = timm.create_model(f"cifar_resnet{depth}")
    model.load_state_dict(load_file(shared_data / f"resnet{depth}_cifar10.safetensors"))
    model = model.eval().to(memory_format=torch.channels_last)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    test = Cifar10(root=str(cifar10_root)).load("test")
    found = 0
    with torch.inference_mode():
        for indices in torch.arange(0, len(test), every).split(100):
            images, labels = test.batch(indices)
            logits = model(((images - mean) / std).contiguous(memory_format=torch.channels_last))
            found += int((logits.argmax(1) == labels).sum())
    assert len(test) == 10_000
    assert found == correct
