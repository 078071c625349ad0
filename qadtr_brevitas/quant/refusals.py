"""What `convert()` cannot convert, named before anything is copied or changed."""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.quant.switch import Switch

_UNDO = {
    "orig": "torch.nn.utils.prune.remove(module, {name!r}) or torch.nn.utils.remove_spectral_norm(module)",
    "g": "torch.nn.utils.remove_weight_norm(module)",
}


def check_convertible(net: nn.Module) -> None:
    """Raise if a network is one that a conversion would change or break.

    Raises:
        UsageError: it has no parameters, is converted already, is scripted, computes in another type than float32, or
            has a module whose weight or forward is set from outside.
    """
    kind = type(net).__name__
    if isinstance(getattr(net, "switch", None), Switch):
        raise UsageError(
            f"{kind} is a switchable model already, with the precisions {_names(net)}: convert the float network it "
            "was made of, with all precisions at once"
        )
    if next(net.parameters(), None) is None:
        raise UsageError(f"{kind} has no parameters: there is nothing to quantize")
    for name, module in net.named_modules():
        place = f"{name} ({type(module).__name__})" if name else kind
        if isinstance(getattr(module, "switch", None), Switch):
            raise UsageError(f"{place} is part of a switchable model already: convert the float network")
        if isinstance(module, torch.jit.ScriptModule):
            raise UsageError(
                f"{place} is scripted or traced, and its layers cannot be replaced: convert the network that "
                "torch.jit.script or torch.jit.trace was called with"
            )
        _check_weights(place, module)
        _check_forward(place, module)
    _check_types(kind, net)


def _names(net: nn.Module) -> str:
    return ", ".join(str(precision) for precision in net.switch.allowed)  # pyright: ignore


def _check_types(kind: str, net: nn.Module) -> None:
    for name, parameter in net.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16, torch.float64):
            raise UsageError(
                f"{name} of {kind} is {str(parameter.dtype).removeprefix('torch.')}, but weights are quantized from "
                "float32: call float() on the network first, and use autocast for mixed precision"
            )


def _check_weights(place: str, module: nn.Module) -> None:
    """Refuse tensors that a hook sets before each forward, whose parameters have other names."""
    for name, value in vars(module).items():
        parts = [part for part in ("orig", "g") if f"{name}_{part}" in module._parameters]  # pyright: ignore
        if isinstance(value, Tensor) and parts:
            undo = _UNDO[parts[0]].format(name=name)
            raise UsageError(
                f"the {name} of {place} is made by a hook (pruning, weight_norm, spectral_norm), which a conversion "
                f"would lose: make it permanent with {undo}, or use torch.nn.utils.parametrizations"
            )


def _check_forward(place: str, module: nn.Module) -> None:
    forward = vars(module).get("forward")
    if forward is not None and not (isinstance(forward, MethodType) and forward.__self__ is module):
        raise UsageError(
            f"{place} has a forward that was set on it from outside, which a copy cannot follow: define it in a class "
            "that derives from that of the module"
        )
