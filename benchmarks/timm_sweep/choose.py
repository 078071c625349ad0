"""Which model stands for a module of timm or torchvision, and at what image size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from qadtr_brevitas.models.torchvision_models import create_torchvision_model, torchvision_config, torchvision_names

# Tried from the left, up to the model's own.
_SIZES = (64, 96, 128, 160, 192, 224, 256, 288, 320, 384)
_TORCHVISION = "torchvision."


def all_modules() -> list[str]:
    """Every module of timm, and those of torchvision that define networks which timm lacks, as torchvision.NAME."""
    theirs = {_TORCHVISION + _torchvision_module(name) for name in torchvision_names()}
    return [*timm.list_modules(), *sorted(theirs)]


def smallest_model(module: str) -> str:
    """The model of a module that has the fewest parameters, the first by name among equals.

    Args:
        module: as in `all_modules()`.
    """
    if module.startswith(_TORCHVISION):
        names = [name for name in torchvision_names() if _TORCHVISION + _torchvision_module(name) == module]
    else:
        names = timm.list_models(module=module)
    return min(names, key=lambda name: (_parameters(name), name))


def _torchvision_module(name: str) -> str:
    return torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]


def _parameters(name: str) -> int:
    try:
        # On this device nothing is allocated and nothing drawn.
        with torch.device("meta"):
            net = create(name, 0)
    except NotImplementedError:  # it computes with tensors to know its own shape
        net = create(name, 0)
    return sum(parameter.numel() for parameter in net.parameters())


def create(name: str, seed: int, **args: Any) -> nn.Module:
    """A float network of timm, or of torchvision's that timm lacks, with random weights."""
    torch.manual_seed(seed)
    if name in torchvision_names():
        return create_torchvision_model(name, num_classes=1000, args=args)
    return timm.create_model(name, **args)


def smallest_input(name: str) -> tuple[tuple[int, int], dict[str, Any]]:
    """The smallest image size at which a model runs, and the arguments that make it take that size.

    Args:
        name: of timm or torchvision.

    Returns:
        Height and width, and arguments of `create`; the model's own size, and none, if it runs at no smaller one.
    """
    in_timm = name not in torchvision_names()
    config = timm.models.get_pretrained_cfg(name).to_dict() if in_timm else torchvision_config(name)
    channels, *own = config["input_size"]
    # On the device without data nothing is computed; some networks do not run there.
    device = next((device for device in ("meta", "cpu") if _runs(name, (channels, *own), device, {})), "cpu")
    for size, args in _tries(min(own)):
        if _runs(name, (channels, size, size), device, args):
            return (size, size), args
    return (own[0], own[1]), {}


def _runs(name: str, shape: tuple[int, ...], device: str, args: dict[str, Any]) -> bool:
    try:
        with torch.device(device), torch.no_grad():
            create(name, 0, **args).eval()(torch.zeros(1, *shape))
    except Exception:  # whatever a network says to an image it cannot take
        return False
    return True


def _tries(own: int) -> Iterator[tuple[int, dict[str, Any]]]:
    for size in _SIZES:
        if size < own:
            yield size, {}
            yield size, {"img_size": size}
            yield size, {"image_size": size}
