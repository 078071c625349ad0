"""Quantization of pixels, with gradients passed straight through: Q_b of eq. (1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qadtr_brevitas.core.precision import FLOAT_BITS

PATCH_FILE_BITS = 8
"""Patches are on the grid of 8-bit images: they are quantized before they are scored, not when they are saved."""


def fake_quantize(values: Tensor, bits: int, *, step_error: float = 0.0) -> Tensor:
    """Quantize pixels uniformly on [0, 1]: round(p * (2^b - 1)) / (2^b - 1).

    The gradient is the identity for values inside [0, 1] and zero outside, where they are clipped. At 32 bit the
    values are returned as they are.

    Args:
        values: any shape, range [0, 1].
        bits: bit-width b; the result has at most 2^b levels.
        step_error: relative error of the quantizer's step, above -1: quantization noise.

    Returns:
        Same shape, range [0, 1].
    """
    if bits == FLOAT_BITS:
        return values
    top = 2**bits - 1
    return _RoundToGrid.apply(values, top / (1 + step_error), top)  # pyright: ignore[reportReturnType]


class _RoundToGrid(torch.autograd.Function):
    """Clips to [0, 1] and rounds to multiples of 1 / steps, at most `top` of them."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, steps: float, top: int) -> Tensor:
        # Both ends count as inside, or a pixel at 0 or 1 could never leave; releases of torch.clamp differ in this.
        ctx.save_for_backward((values >= 0) & (values <= 1))
        # A division by a number is a product with its rounded reciprocal on CUDA, and misses half of the levels.
        divisor = torch.full((), steps, dtype=values.dtype, device=values.device)
        return values.clamp(0, 1).mul_(steps).round_().clamp_(max=top).div_(divisor).clamp_(max=1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return grad_outputs[0] * inside, None, None
