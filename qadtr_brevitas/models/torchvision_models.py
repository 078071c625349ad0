"""The classification networks of torchvision that timm lacks, such as AlexNet, with the attributes of timm networks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import timm
import torchvision
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model, get_model_weights, list_models

# The published weights of GoogLeNet need `transform_input`; the heads that only training uses are left out.
_SETTINGS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "transform_input": True, "init_weights": True}
}


@cache
def torchvision_names() -> tuple[str, ...]:
    """Return the names of torchvision's classification networks that timm lacks, sorted."""
    return tuple(sorted(set(list_models(module=torchvision.models)) - set(timm.list_models())))


def create_torchvision_model(
    name: str, *, num_classes: int, pretrained: bool = False, args: Mapping[str, Any] | None = None
) -> nn.Module:
    """Make a float network of torchvision, with the attribute `pretrained_cfg` of timm networks.

    Args:
        name: one of `torchvision_names()`.
        num_classes: outputs.
        pretrained: load torchvision's default weights; the last layer only if it has as many classes.
        args: further arguments of the builder.

    Raises:
        OSError: the weights cannot be fetched.
        RuntimeError: they do not fit, because of `args`.
        TypeError, ValueError: the builder refuses an argument.
    """
    settings = {**_SETTINGS.get(name, {}), **(args or {})}
    net = get_model(name, weights=None, num_classes=num_classes, **settings)
    config = torchvision_config(name)
    first, classifier = _ends(net)
    net.pretrained_cfg = {**config, "first_conv": first, "classifier": classifier}  # pyright: ignore[reportArgumentType]
    if pretrained:
        _load_published(net, name, without=None if num_classes == config["num_classes"] else classifier)
    return net


def torchvision_config(name: str) -> dict[str, Any]:
    """Return a `pretrained_cfg` as timm has: classes and preprocessing of the default weights."""
    weights = _weights(name)
    transform = weights.transforms()
    size, resized = transform.crop_size[0], transform.resize_size[0]
    return {
        "architecture": name,
        "num_classes": len(weights.meta["categories"]),
        "input_size": (3, size, size),
        "fixed_input_size": _size_argument(name) is not None,
        "mean": tuple(transform.mean),
        "std": tuple(transform.std),
        "crop_pct": size / resized,
        "interpolation": transform.interpolation.value,
    }


def torchvision_size_args(name: str, image_size: tuple[int, int]) -> dict[str, Any]:
    """Return the argument that sets the image size of a network with a fixed one, or none."""
    argument = _size_argument(name)
    if argument is None:
        return {}
    return {argument: image_size if argument == "input_size" else image_size[0]}


def _size_argument(name: str) -> str | None:
    return "image_size" if name.startswith("vit_") else "input_size" if name.startswith("maxvit_") else None


def _weights(name: str) -> WeightsEnum:
    return get_model_weights(name)["DEFAULT"]


def _ends(net: nn.Module) -> tuple[str, str]:
    """Return the names of the first convolution and of the last layer that has weights."""
    layers = {name: type(module) for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    return next(name for name, kind in layers.items() if kind is nn.Conv2d), list(layers)[-1]


def _load_published(net: nn.Module, name: str, *, without: str | None) -> None:
    """Load the published weights, without those of one layer and of the heads that only training uses."""
    published: Mapping[str, Tensor] = _weights(name).get_state_dict(progress=False, check_hash=True, weights_only=True)
    left_out = ("aux1.", "aux2.") if without is None else ("aux1.", "aux2.", f"{without}.")
    weights = {key: value for key, value in published.items() if not key.startswith(left_out)}
    own = {key: value for key, value in net.state_dict().items() if key.startswith(left_out)}
    net.load_state_dict({**own, **weights})
