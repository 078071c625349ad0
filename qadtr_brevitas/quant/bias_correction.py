"""A constant per output channel and precision that a layer adds to its bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qadtr_brevitas.precision import Precision
from qadtr_brevitas.quant.switch import Switch


class BiasCorrection(nn.Module):
    """What a layer adds to its bias at each precision below 32.

    Args:
        switch: the model's switch.
        like: a tensor with one value per output channel, whose device and type are taken.
    """

    def __init__(self, switch: Switch, like: Tensor) -> None:
        super().__init__()
        self.switch = switch
        for precision in switch.allowed:
            if not precision.is_float:
                self.register_buffer(str(precision), torch.zeros_like(like))

    def offset(self, precision: Precision) -> Tensor:
        """What is added at a precision below 32, (out,)."""
        return self.get_buffer(str(precision))

    def forward(self, bias: Tensor | None) -> Tensor | None:
        """The corrected bias at the precision in force, (out,)."""
        if self.switch.precision.is_float:
            return bias
        offset = self.offset(self.switch.precision)
        return offset if bias is None else bias + offset
