"""Mixed precisions: each quantizer learns its own bit-width at each of them, and is then switched as at any precision.

A quantizer has one threshold per bit-width, so a mixed precision shares the thresholds of the bit-widths that it uses
with the other precisions. Norm statistics and what PTQ methods find are its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from qadtr_brevitas.core.errors import UsageError, first_names
from qadtr_brevitas.core.layer_bits import MixedPrecision
from qadtr_brevitas.core.precision import Precision, PrecisionLike, parse_precisions
from qadtr_brevitas.quant.switchable_quant import SwitchableQuant, SwitchableWeightQuant

WHOLE = "network"
"""The name of the network itself, where it quantizes what no module of its own does."""


def mixed_precisions(layers: Mapping[str, Mapping[str, Any]] | None) -> list[MixedPrecision]:
    """Return mixed precisions from the bit-widths by pattern of each name.

    Raises:
        UsageError: a name or a bit-width is not possible.
    """
    return [MixedPrecision.make(name, patterns) for name, patterns in (layers or {}).items()]


def with_mixed(precisions: Sequence[PrecisionLike], mixed: Sequence[MixedPrecision]) -> tuple[Precision, ...]:
    """Return all precisions of a model: those given, and each mixed one.

    Raises:
        UsageError: a mixed precision is given that is not defined, or none at all.
    """
    allowed = parse_precisions([*precisions, *(one.precision for one in mixed)])
    known = {one.name for one in mixed}
    if unknown := [str(precision) for precision in allowed if precision.is_mixed and precision.name not in known]:
        raise UsageError(
            f"{', '.join(unknown)} has no bit-widths: give layers={{{Precision.parse(unknown[0]).name!r}: "
            "{'*': 4, 'layer4.*': 8}} (quant.layers in a recipe)"
        )
    return allowed


def quantizers_by_layer(net: nn.Module, names: Collection[str]) -> Iterator[tuple[str, SwitchableQuant]]:
    """Yield each quantizer of a network with the name of the module of the float network that it belongs to.

    Args:
        net: the converted network.
        names: names of the modules of the float network.
    """
    known = {name for name in names if name}
    for path, module in net.named_modules():
        if isinstance(module, SwitchableQuant):
            parts = path.split(".")
            owners = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
            yield next((owner for owner in owners if owner in known), WHOLE), module


def set_layers(net: nn.Module, mixed: Sequence[MixedPrecision], names: Collection[str]) -> None:
    """Tell the quantizers of a network their bit-widths at mixed precisions, in place.

    Args:
        net: the converted network.
        mixed: the mixed precisions.
        names: names of the modules of the float network.

    Raises:
        UsageError: a pattern matches no layer that is quantized (the nearest names are offered), or a quantizer has no
            bit-width.
    """
    found = list(quantizers_by_layer(net, names))
    for one in mixed:
        _check_patterns(one, found)
        for layer, quantizer in found:
            bits = _bits(one, layer, quantizer)
            assert bits is not None
            quantizer.use_at(one.name, bits)


def _bits(mixed: MixedPrecision, layer: str, quantizer: SwitchableQuant) -> int | None:
    return mixed.weight(layer) if isinstance(quantizer, SwitchableWeightQuant) else mixed.act(layer)


def _check_patterns(mixed: MixedPrecision, found: Sequence[tuple[str, SwitchableQuant]]) -> None:
    for pattern, bits in mixed.patterns.items():
        kinds = [kind for kind, given in (("weights", bits.weight), ("activations", bits.act)) if given is not None]
        layers = list(dict.fromkeys(layer for layer, quantizer in found if _kind(quantizer) in kinds))
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            near = get_close_matches(pattern.strip("*."), layers, n=3, cutoff=0.3) or layers
            raise UsageError(
                f"{mixed.precision}: no layer whose {' or '.join(kinds)} are quantized is called {pattern!r}: choose "
                f"from {first_names(near)}, with * for anything"
            )
    for kind in ("weights", "activations"):
        without = [
            layer for layer, quantizer in found if _kind(quantizer) == kind and _bits(mixed, layer, quantizer) is None
        ]
        if without:
            raise UsageError(
                f"{mixed.precision} says no bit-width for the {kind} of {first_names(list(dict.fromkeys(without)))}: "
                "begin with a pattern for all others, for instance '*': 4"
            )


def _kind(quantizer: SwitchableQuant) -> str:
    return "weights" if isinstance(quantizer, SwitchableWeightQuant) else "activations"
