"""MagR: weights without outliers, whose outputs are nearly the same (Zhang et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Annotated

import torch
from torch import Tensor, nn

from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.core.precision import FLOAT_BITS, Precision
from qadtr_brevitas.quant.layer_inputs import LayerCalls, Moments
from qadtr_brevitas.quant.layers import SwitchableLayer, switchable_layers
from qadtr_brevitas.quant.ptq import PtqRun, quantized_precisions
from qadtr_brevitas.quant.rounding_method import RoundingMethod, set_levels, wanted_weight
from qadtr_brevitas.quant.switch import at_precision, evaluating

_FLOAT = Precision(FLOAT_BITS, FLOAT_BITS)
# Steps of the power iteration.
_POWER_STEPS = 30


@plugin
class MagR(RoundingMethod):
    """Make the largest weights of each output channel smaller, so that its levels lie closer; outputs hardly change.

    For the weights w of a channel it minimizes half the squared change of the outputs on float inputs, in units of the
    largest singular value of their second moments, plus `alpha` * max |w| * max |u| over the new weights u. Ranges are
    set for u, and methods after it in the list (`gptq`) start from u. It runs before the ranges are set, wherever it
    stands in the list; alone, it rounds u to the nearest levels.

    Source: Zhang et al. 2024, https://arxiv.org/abs/2406.00800, with Nesterov's momentum (Beck and Teboulle 2009) and
    with `alpha` relative to max |w|, so that it means the same in all layers.
    """

    alpha: Annotated[
        float, Field(gt=0, description="how much smaller weights count, beside the change of the outputs")
    ] = 0.001
    steps: Annotated[int, Field(ge=1, description="steps of the proximal gradient descent")] = 100
    parallel: Annotated[
        int, Field(ge=1, description="layers whose second moments are in memory at once: more is faster")
    ] = 16

    def start(self, model: nn.Module) -> PtqRun:
        return _Run(self, model)


class _Run(PtqRun):
    def __init__(self, method: MagR, model: nn.Module) -> None:
        self._method = method
        self._model = model
        self.passes = 1 + -(-len(switchable_layers(model)) // method.parallel)

    @contextmanager
    def aiming(self, batches: Iterable[Tensor], count_batch: Callable[[], object]) -> Generator[None]:
        roundings = [layer.weight_quant.quantizer.rounding for layer in switchable_layers(self._model).values()]
        try:
            with evaluating(self._model), at_precision(self._model, _FLOAT):
                self._aim(batches, count_batch)
            yield
        finally:
            for rounding in roundings:
                if rounding is not None:
                    rounding.wanted = None

    def _aim(self, batches: Iterable[Tensor], count_batch: Callable[[], object]) -> None:
        calls = LayerCalls(self._model)
        with calls.watching():
            for images in batches:
                self._model(images)
                count_batch()
        for part in calls.parts(self._method.parallel):
            found = calls.moments(part, _FLOAT, batches, count_batch, mixed=False)
            for layer, moments in found.items():
                rounding = layer.weight_quant.quantizer.rounding
                assert rounding is not None
                rounding.wanted = self._reduced(wanted_weight(layer), moments)

    def _reduced(self, weight: Tensor, moments: Moments) -> Tensor:
        groups = weight.float().reshape(len(moments.quantized), -1, moments.quantized.shape[-1])
        method = self._method
        found = [
            reduced(rows, own, alpha=method.alpha, steps=method.steps)
            for rows, own in zip(groups, moments.quantized, strict=True)
        ]
        return torch.cat(found).view_as(weight).to(weight.dtype)

    @torch.no_grad()
    def improve(self, batches: Iterable[Tensor], count_batch: Callable[[], object]) -> None:
        """Round the new weights to the nearest levels, where no method before has chosen some."""
        for precision in quantized_precisions(self._model):
            for layer in switchable_layers(self._model).values():
                self._round(layer, precision)

    def _round(self, layer: SwitchableLayer, precision: Precision) -> None:
        quantizer = layer.weight_quant.quantizer
        rounding = quantizer.rounding
        with at_precision(self._model, precision):
            if quantizer.is_active and rounding is not None and rounding.offset(precision) is None:
                set_levels(
                    self._model, layer, precision, quantizer.nearest_levels(wanted_weight(layer), quantizer.bits)
                )


def reduced(weight: Tensor, moments: Tensor, *, alpha: float, steps: int) -> Tensor:
    """Return the weights of some output channels with smaller maxima.

    Args:
        weight: float32, (channels, n).
        moments: second moments of the inputs, (n, n); all 0 leaves the weights as they are.
        alpha: how much the largest weight of a channel counts, as a share of what it was.
        steps: steps of the accelerated proximal gradient descent.
    """
    largest_moment = _largest_singular_value(moments)
    if not largest_moment > 0:
        return weight
    curvature = moments / largest_moment
    shrinkage = alpha * weight.abs().amax(1, keepdim=True)
    found = ahead = weight
    momentum = 1.0
    for _ in range(steps):
        before = found
        found = _shrunk(ahead - (ahead - weight) @ curvature, shrinkage)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = found + (momentum - 1) / following * (found - before)
        momentum = following
    return found


def _shrunk(weight: Tensor, shrinkage: Tensor) -> Tensor:
    """Clip each row at the height at which what is clipped sums up to the shrinkage, (rows, 1), or at 0.

    It is the proximal operator of `shrinkage` times the largest magnitude (Parikh and Boyd 2014, section 6.5.2).
    """
    sizes = weight.abs().sort(dim=1, descending=True).values
    counts = torch.arange(1, sizes.shape[1] + 1, device=sizes.device)
    # The height if the first k weights are clipped; the right k gives the greatest.
    heights = ((sizes.cumsum(1) - shrinkage) / counts).amax(1, keepdim=True).clamp(min=0)
    return torch.minimum(torch.maximum(weight, -heights), heights)


def _largest_singular_value(moments: Tensor) -> float:
    """Return the largest singular value of a symmetric matrix without negative ones, a bit above rather than below."""
    vector = moments.sum(1)
    for _ in range(_POWER_STEPS):
        if not (size := vector.norm()) > 0:
            break
        vector = moments @ (vector / size)
    # The power iteration comes from below, and steps that are too long diverge.
    return 1.01 * float(vector.norm())
