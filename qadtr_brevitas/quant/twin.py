"""A quantizer with finer steps below zero than above (Yuan et al. 2022)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from torch import Tensor

from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.quant.quantizer import Levels, Quantizer


@plugin
class Twin(Quantizer):
    """Multiples of a step above 0, and of a step that is 2^shift times as small below, for the outputs of GELUs.

    GELUs reach down to -0.17 only, and up to any value: with one step, few levels or none are left below 0. At b bits
    either side has 2^(b-1) levels, so that one bit says which side, and hardware multiplies integers and shifts. Values
    down to -(threshold / 2^shift) are covered, so 2^shift should be about threshold / 0.17. Unsigned values have one
    step, as with `uniform`.

    Source: twin uniform quantization, PTQ4ViT (Yuan et al. 2022, https://arxiv.org/abs/2111.12293, equation 8).
    """

    shift: Annotated[int, Field(ge=1, le=12, description="the step below 0 is 2^shift times as small")] = 4

    has_stock_levels: ClassVar[bool] = False
    # Negative weights are as large as positive ones, and would be clipped to 1 / 2^shift of their range.
    for_weights: ClassVar[bool] = False

    def levels(self, bits: int, *, signed: bool, narrow_range: bool) -> Levels:
        if not signed:
            return 0, 2**bits - 1
        return -(2 ** (bits - 1)) + int(narrow_range), 2 ** (bits - 1) - 1

    def steps_per_threshold(self, levels: Levels) -> int:
        return levels[1]

    def reach(self, levels: Levels) -> float:
        return float(levels[1])

    def passing(self, levels: Levels) -> tuple[float, float]:
        return levels[0] / 2**self.shift, float(levels[1])

    @torch.no_grad()
    def round(self, scaled: Tensor, levels: Levels, *, out: Tensor | None = None) -> Tensor:
        lo, hi = levels
        factor = 2**self.shift
        below = (scaled * factor).round_().clamp_(lo, 0).div_(factor)
        return torch.add(below, scaled.round().clamp_(0, hi), out=out)
