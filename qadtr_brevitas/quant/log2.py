"""A quantizer whose levels are the threshold divided by powers of two."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qadtr_brevitas.core.plugin import plugin
from qadtr_brevitas.quant.quantizer import Levels, Quantizer


@plugin
class Log2(Quantizer):
    """Zero and t, t/2, t/4, ... of either sign, for threshold t (Miyashita et al. 2016): products become shifts.

    The levels are fine near zero and coarse near the threshold, which suits attention probabilities (FQ-ViT, Lin et
    al. 2022) and weights with long tails. The exponent is rounded to the nearest integer, and magnitudes below the
    range of the smallest level become 0.
    """

    has_stock_levels: ClassVar[bool] = False

    def levels(self, bits: int, *, signed: bool, narrow_range: bool) -> Levels:
        """Return codes: 0 for zero, k for t / 2^(k - 1), with a sign; signed codes are always symmetric."""
        highest = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        return -highest if signed else 0, highest

    def steps_per_threshold(self, levels: Levels) -> int:
        return 1

    def reach(self, levels: Levels) -> float:
        return 1.0

    @torch.no_grad()
    def round(self, scaled: Tensor, levels: Levels, *, out: Tensor | None = None) -> Tensor:
        lo, hi = levels
        magnitude = scaled.abs() if lo < 0 else scaled.clamp(min=0)
        exponent = magnitude.log2().round().clamp(max=0)
        rounded = torch.where(exponent > -hi, exponent.exp2(), 0.0) * scaled.sign()
        return rounded if out is None else out.copy_(rounded)
