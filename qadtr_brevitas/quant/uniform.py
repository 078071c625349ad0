"""Quantizers with levels at equal distances: any step, or steps that are powers of two."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from qadtr_brevitas.core.plugin import plugin
from qadtr_brevitas.quant.fake_quantize import quantize_activation, quantize_weight
from qadtr_brevitas.quant.quantizer import Granularity, Levels, Quantizer

# A step that exceeds a power of two by no more than floats round is one.
_ROUNDING = 1e-6


@plugin
class Uniform(Quantizer):
    """Integer multiples of a step, as Brevitas, PyTorch and ONNX have them; the step is learned (LSQ, Esser 2020)."""

    granularity: Annotated[
        Granularity | None,
        Field(description="what has a threshold of its own: tensor, channel, group; null: see quant.per_channel"),
    ] = None
    group_size: Annotated[int, Field(ge=1, description="input channels of a group")] = 32

    def levels(self, bits: int, *, signed: bool, narrow_range: bool) -> Levels:
        if not signed:
            return 0, 2**bits - 1
        return -(2 ** (bits - 1)) + int(narrow_range), 2 ** (bits - 1) - 1

    def steps_per_threshold(self, levels: Levels) -> int:
        """Return the threshold in steps, as Brevitas's IntScaling has it."""
        return max(-levels[0], levels[1])

    def reach(self, levels: Levels) -> float:
        """Return the largest magnitude in steps that is off by at most half a step.

        Signed levels have one more below 0 unless their range is narrow, so this is half a step beyond the highest (as
        in PyTorch's MinMaxObserver).
        """
        lo, hi = levels
        return (hi - lo) / 2 if lo < 0 else hi

    def round(self, scaled: Tensor, levels: Levels, *, out: Tensor | None = None) -> Tensor:
        return torch.round(scaled, out=out).clamp_(*levels)

    def quantize_activation(self, x: Tensor, scale: Tensor, levels: Levels, *, keep_input: bool) -> Tensor:
        return quantize_activation(x, scale, *levels, keep_input=keep_input)

    def quantize_weight(self, w: Tensor, scale: Tensor, levels: Levels) -> Tensor:
        return quantize_weight(w, scale, *levels)


@plugin
class PowerOfTwo(Uniform):
    """Integer multiples of a step that is a power of two, the nearest to the learned one: shifts in fixed point."""

    @property
    def halving(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """True: thresholds of powers of two are a factor of two apart."""
        return True

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
