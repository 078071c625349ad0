"""Quantizers with equally spaced levels: any step, or steps that are powers of two."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from qadtr_brevitas.core.plugin import plugin
from qadtr_brevitas.quant.fake_quantize import quantize_activation, quantize_images
from qadtr_brevitas.quant.quantize_weight import quantize_weight
from qadtr_brevitas.quant.quantizer import Levels, Quantizer

# Float rounding of a step that was computed from a power of two.
_ROUNDING = 1e-6


@plugin
class Uniform(Quantizer):
    """Integer multiples of a step, as in Brevitas, PyTorch and ONNX; the step is learned (LSQ, Esser et al. 2020)."""

    def levels(self, bits: int, *, signed: bool, narrow_range: bool) -> Levels:
        if not signed:
            return 0, 2**bits - 1
        return -(2 ** (bits - 1)) + int(narrow_range), 2 ** (bits - 1) - 1

    def steps_per_threshold(self, levels: Levels) -> int:
        """Return the number of steps between 0 and the threshold, as in Brevitas's IntScaling."""
        return max(-levels[0], levels[1])

    def reach(self, levels: Levels) -> float:
        """Return the largest magnitude, in steps, whose rounding error is at most half a step.

        Signed levels have one more below 0 unless the range is narrow, so this is half a step above the highest level
        (as in PyTorch's MinMaxObserver).
        """
        lo, hi = levels
        return (hi - lo) / 2 if lo < 0 else hi

    def passing(self, levels: Levels) -> tuple[float, float]:
        return float(levels[0]), float(levels[1])

    def round(self, scaled: Tensor, levels: Levels, *, out: Tensor | None = None) -> Tensor:
        return torch.round(scaled, out=out).clamp_(*levels)

    def quantize_activation(self, x: Tensor, scale: Tensor, levels: Levels, *, keep_input: bool) -> Tensor:
        return quantize_activation(x, scale, *levels, keep_input=keep_input)

    def quantize_weight(self, w: Tensor, scale: Tensor, levels: Levels) -> Tensor:
        return quantize_weight(w, scale, *levels)

    def quantize_images(self, x: Tensor, scale: Tensor, levels: Levels, *, low: float, high: float) -> Tensor:
        return quantize_images(x, scale, *levels, low=low, high=high)


def is_uniform(scheme: Quantizer) -> bool:
    """Return whether a quantizer of activations rounds and passes gradients as `Uniform` does, whatever its steps."""
    ours = Uniform.round, Uniform.passing, Uniform.quantize_activation
    return (type(scheme).round, type(scheme).passing, type(scheme).quantize_activation) == ours


@plugin
class PowerOfTwo(Uniform):
    """Integer multiples of the power of two that is nearest to a learned step: shifts in fixed point."""

    doubling_thresholds: ClassVar[bool] = True

    @torch.no_grad()
    def nearest_threshold(self, threshold: Tensor, levels: Levels, *, limit: float | None, above: bool) -> Tensor:
        steps = self.steps_per_threshold(levels)
        step = threshold / steps
        exponent = step.log2().round()
        if above:
            exponent = exponent + (exponent.exp2() * (1 + _ROUNDING) < step)
        if limit is not None:
            exponent = exponent.clamp(max=math.floor(math.log2(limit / steps)))
        return exponent.exp2() * steps
