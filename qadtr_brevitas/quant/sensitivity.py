"""How much each layer costs at each bit-width: the change of the logits with that layer alone quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.core.progress import Progress, silent
from qadtr_brevitas.quant.layers import switchable_layers
from qadtr_brevitas.quant.mixed import quantizers_by_layer
from qadtr_brevitas.quant.model import SwitchableModel
from qadtr_brevitas.quant.switch import SwitchState, allowed_precisions, observing
from qadtr_brevitas.quant.switchable_quant import SwitchableQuant, SwitchableWeightQuant

Kind: TypeAlias = Literal["weights", "activations"]


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing the weights or the activations of one layer does to the logits.

    Args:
        layer: name in the float network.
        kind: what is quantized.
        values: number of weights; 0 for activations.
        kl: mean Kullback-Leibler divergence of the classes' probabilities from those of the float network, in nats, by
            bit-width; nothing where the layer keeps its bits.
        mse: mean squared difference of the logits, likewise.
    """

    layer: str
    kind: Kind
    values: int
    kl: Mapping[int, float]
    mse: Mapping[int, float]


def uniform_bits(model: nn.Module) -> list[int]:
    """Return the bit-widths below 32 of the precisions of a model with equal bit-widths, the highest first.

    Raises:
        UsageError: there are none.
    """
    found = sorted({p.weight for p in allowed_precisions(model) if p.is_tied and not p.is_float}, reverse=True)
    if not found:
        raise UsageError(
            "the model has no precision such as 8 or 4, at which layers could be quantized one by one: convert it with "
            "quant.precisions=[32,8,4]"
        )
    return found


@torch.no_grad()
def sensitivities(
    model: SwitchableModel, batches: Sequence[Tensor], *, progress: Progress | None = None
) -> list[Sensitivity]:
    """Measure a calibrated model, with all but one layer in float, on images.

    Args:
        model: a switchable model, which is left as it was.
        batches: images (n, C, H, W) in [0, 1], on the model's device.
        progress: told the quantizers and bit-widths done, and how many there are.

    Returns:
        One for the weights and one for the activations of each layer that has such, in the order of the network.

    Raises:
        UsageError: no precision has equal bit-widths below 32.
    """
    bits = uniform_bits(model)
    names = [layer.name for layer in model.report.layers]
    groups: dict[tuple[str, Kind], list[SwitchableQuant]] = {}
    for layer, quantizer in quantizers_by_layer(model.net, names):
        groups.setdefault((layer, _kind(quantizer)), []).append(quantizer)
    plain = _logits(model, batches, lambda quantizer, x: None)
    tell, done = progress or silent, 0
    found: list[Sensitivity] = []
    for (layer, kind), quantizers in groups.items():
        kl: dict[int, float] = {}
        mse: dict[int, float] = {}
        # Those of a layer that keeps 8 bit are the same at fewer.
        known: dict[tuple[int, ...], tuple[float, float]] = {}
        for width in bits:
            key = tuple(max(width, quantizer.min_bits) for quantizer in quantizers)
            if key not in known:
                known[key] = _changes(plain, _logits(model, batches, _only(quantizers, width)))
            kl[width], mse[width] = known[key]
            done += 1
            tell(done, len(groups) * len(bits), f"{layer} at {width} bit")
        found.append(Sensitivity(layer, kind, _values(model, layer) if kind == "weights" else 0, kl, mse))
    return found


def _kind(quantizer: SwitchableQuant) -> Kind:
    return "weights" if isinstance(quantizer, SwitchableWeightQuant) else "activations"


def _values(model: SwitchableModel, layer: str) -> int:
    layers = switchable_layers(model.net)
    return layers[layer].weight.numel() if layer in layers else 0


def _only(quantizers: Sequence[SwitchableQuant], bits: int) -> Callable[[SwitchableQuant, Tensor], Tensor | None]:
    """Return an observer that lets some quantizers quantize, in a network that runs in float."""
    state, chosen = SwitchState(Precision(bits, bits)), set(quantizers)

    def quantize(quantizer: Any, x: Tensor) -> Tensor | None:
        return quantizer.quantize(x, state) if quantizer in chosen else None

    return quantize


def _logits(model: SwitchableModel, batches: Sequence[Tensor], observer: Callable[..., Tensor | None]) -> Tensor:
    with observing(model, observer):
        return torch.cat([model(images).double() for images in batches])


def _changes(plain: Tensor, logits: Tensor) -> tuple[float, float]:
    """Return the divergence and the squared difference of logits (n, classes) from plain ones."""
    expected, found = (F.log_softmax(each, dim=1) for each in (plain, logits))
    divergence = (expected.exp() * (expected - found)).sum(1).mean()
    # Float rounding can make that of equal logits a little less than 0.
    return max(0.0, float(divergence)), float(F.mse_loss(logits, plain))
