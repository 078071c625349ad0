"""The quantizers that a conversion is given, and what its target supports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qadtr_brevitas.core.errors import UsageError, first_names
from qadtr_brevitas.core.registry import QUANTIZERS
from qadtr_brevitas.quant.feature_clip import FeatureClipping
from qadtr_brevitas.quant.plan import Activations, FirstLast
from qadtr_brevitas.quant.probe import Probe
from qadtr_brevitas.quant.products import ATTENTION
from qadtr_brevitas.quant.provenance import GELU, SOFTMAX
from qadtr_brevitas.quant.quantizer import Quantizer, make_quantizer
from qadtr_brevitas.quant.targets import Target

Given = Quantizer | str | Mapping[str, Any] | None
"""A quantizer as an object, its name, or its name and keys; None for the default."""


@dataclass(frozen=True)
class Quantizers:
    """The quantizers of a conversion.

    Args:
        weights: that of weights.
        acts: that of activations.
        after: those of the values of functions that have one of their own, by function.
    """

    weights: Quantizer
    acts: Quantizer
    after: Mapping[str, Quantizer]


def chosen_quantizers(target: Target | None, *, weights: Given, acts: Given, softmax: Given, gelu: Given) -> Quantizers:
    """Return the quantizers of a conversion for a target, or for any.

    Raises:
        UsageError: one is unknown, weights or activations cannot have it, or the target does not compute with that of
            weights or activations. `check_target` checks those of functions, when it is known which layers have them.
    """
    after = {name: make_quantizer(given) for name, given in ((SOFTMAX, softmax), (GELU, gelu)) if given is not None}
    found = Quantizers(_quantizer(weights, target), _quantizer(acts, target), after)
    if not found.weights.for_weights:
        others = [name for name, kind in QUANTIZERS.load_all().items() if kind.for_weights]
        raise UsageError(
            f"{type(found.weights).__name__} is a quantizer of activations, and would clip negative weights: choose "
            f"another weight_quantizer, as {', '.join(others)}"
        )
    for name, each in {"act": found.acts, **after}.items():
        if each.granularity not in (None, "tensor"):
            raise UsageError(f"activations have one threshold per tensor: leave granularity out of {name}_quantizer")
    return found


def _quantizer(given: Quantizer | str | Mapping[str, Any] | None, target: Target | None) -> Quantizer:
    """Return the given quantizer, or the target's default, if the target supports it."""
    wanted = "uniform" if target is None else target.quantizer
    quantizer = make_quantizer(wanted if given is None else given)
    if target is not None and not _computes_with(target, quantizer):
        raise UsageError(
            f"{target.name} computes with the quantizer {target.quantizer!r} only, got {type(quantizer).__name__}: "
            "leave the quantizers out, or convert without target"
        )
    if target is not None and quantizer.granularity == "group":
        raise UsageError(
            f"{target.name} has no weight thresholds per group: choose granularity 'channel' or 'tensor', or convert "
            "without target"
        )
    return quantizer


def _computes_with(target: Target, quantizer: Quantizer) -> bool:
    return isinstance(quantizer, type(make_quantizer(target.quantizer)))


def check_target(
    target: Target,
    found: Probe,
    first_last: FirstLast,
    activations: Activations,
    clipping: FeatureClipping | None,
    after: Mapping[str, Quantizer],
) -> None:
    """Raise if a target does not support a setting, a product, or a quantizer of the values of functions.

    Raises:
        UsageError: it does not; the layers are named, and the nearest that it supports.
    """
    for function, quantizer in after.items():
        if not _computes_with(target, quantizer):
            raise UsageError(
                f"{target.name} computes with the quantizer {target.quantizer!r} only, got {type(quantizer).__name__} "
                f"as {function}_quantizer of {_readers(found, function)}: the nearest is {function}_quantizer="
                f"{target.quantizer}, or convert without target"
            )
    if clipping is not None and target.products is not None:
        raise UsageError(
            f"{target.name} computes with integers, and feature_clip (after {', '.join(clipping.after)}) divides by "
            "norms of features: leave it out, or convert without target and export to qcdq, qonnx or ort"
        )
    for name, given in (("first_last", first_last), ("activations", activations)):
        if given in ("float", "dynamic"):
            raise UsageError(
                f"{name}={given!r} is not possible with target={target.name!r}, which computes with integers"
            )
    for product in found.products:
        if target.products is not None and product.name not in target.products and not product.is_constant:
            owner = product.owner or "the network"
            raise UsageError(
                f"{target.name} computes convolutions of images and linear layers only, and {owner} computes "
                f"{product.name}: convert it without target, or choose a convolutional network"
            )


def _readers(found: Probe, function: str) -> str:
    """Return the layers that read the values of a function: the first ones, and how many more."""
    products = (
        product
        for product in found.products
        if (function == SOFTMAX and product.name == ATTENTION)
        or any(operand.function == function for operand in product.operands)
    )
    return first_names(list(dict.fromkeys(product.owner or "the network" for product in products))) or "no layer"
