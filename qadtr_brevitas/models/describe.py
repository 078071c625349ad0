"""The name and arguments that make a network again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qadtr_brevitas.core.errors import QadtrError, UsageError
from qadtr_brevitas.models.create import create_float_model


def describe_network(
    net: nn.Module, name: str | None = None, args: Mapping[str, Any] | None = None, *, num_classes: int
) -> tuple[str, dict[str, Any]]:
    """Find the name and the arguments from which `create_float_model` makes a network of the same parameters.

    Args:
        net: a float network.
        name: what makes it; None for the architecture that timm notes in the network.
        args: further keyword arguments of what makes it.
        num_classes: outputs of the network.

    Returns:
        Name and arguments; an empty name if none was given and none is known.

    Raises:
        UsageError: the given name makes no network, or one of other parameters.
    """
    given = dict(args or {})
    if name is not None:
        _check(net, name, given, num_classes)
        return name, given
    config = getattr(net, "pretrained_cfg", None) or {}
    architecture = config.get("architecture")
    if architecture is None:
        return "", given
    found = {**_noted_arguments(net), **given}
    try:
        _check(net, architecture, found, num_classes)
    except QadtrError:
        return "", given
    return architecture, found


def _noted_arguments(net: nn.Module) -> dict[str, Any]:
    """Return the arguments that timm keeps for some networks."""
    noted = getattr(net, "pretrained_model_args", None)
    return dict(noted) if isinstance(noted, Mapping) else {}


def _check(net: nn.Module, name: str, args: Mapping[str, Any], num_classes: int) -> None:
    # Without memory or time for weights. Networks that compute with values as they are made cannot be made so.
    try:
        with torch.device("meta"):
            made = create_float_model(name, num_classes=num_classes, args=args)
    except (QadtrError, RuntimeError):
        made = create_float_model(name, num_classes=num_classes, args=args)
    wanted, found = _shapes(net), _shapes(made)
    if wanted == found:
        return
    differing = next(key for key in (*wanted, *found) if wanted.get(key) != found.get(key))
    raise UsageError(
        f"{name} makes another network: {differing} is {found.get(differing, 'not there')} instead of "
        f"{wanted.get(differing, 'not there')}; check the name and args="
    )


def _shapes(net: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in net.state_dict().items()}
