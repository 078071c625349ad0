"""Steps, levels and weights as tensors, so that one graph of a compiler serves all bit-widths.

The formulas are those of `quant/fake_quantize.py`, whose eager functions are the reference.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor


class TensorLevels(NamedTuple):
    """A fixed quantization of activations; each tensor is float32 and has no dimensions.

    Args:
        step: positive.
        lo: lowest integer level.
        hi: highest integer level.
        low: values at or below it get no gradient.
        high: values at or above it get no gradient.
    """

    step: Tensor
    lo: Tensor
    hi: Tensor
    low: Tensor
    high: Tensor


Statistics: TypeAlias = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""Running mean, running variance, weight and bias of a norm, each (channels,)."""


class IntegerProduct(NamedTuple):
    """A convolution as one of integers.

    Args:
        levels: int8, the weight in steps, (out, in / groups, height, width).
        steps: float32, steps of the weight times that of the input, (1, out or 1, 1, 1).
        per_step: 1 divided by the step of the input, without dimensions.
        zero: the code of 0 in the input.
    """

    levels: Tensor
    steps: Tensor
    per_step: Tensor
    zero: int


class Affine(NamedTuple):
    """What a norm computes with fixed statistics: scale times its input plus offset, each (channels,)."""

    scale: Tensor
    offset: Tensor

    def of(self, x: Tensor) -> Tensor:
        """Return it for x (N, channels, ...)."""
        shape = -1, *(1,) * (x.dim() - 2)
        return x * self.scale.view(shape) + self.offset.view(shape)


@dataclass(frozen=True)
class Prepared:
    """The tensors of each module, by its id.

    Args:
        layers: quantized weight and bias of a convolution or linear layer.
        acts: levels of a quantizer of activations; those that are not here quantize as always.
        norms: what a norm normalizes with, or, in passes without gradients, what that comes to; None if it is folded
            into a convolution.
        integers: convolutions that are computed with integers, in passes without gradients.
    """

    layers: dict[int, tuple[Tensor, Tensor | None]]
    acts: dict[int, TensorLevels]
    norms: dict[int, Statistics | Affine | None]
    integers: dict[int, IntegerProduct] = field(default_factory=dict[int, IntegerProduct])


def quantized(x: Tensor, step: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """Return x rounded to the levels lo * step ... hi * step, in its own type."""
    return (torch.clamp(torch.round(x.float() / step), lo, hi) * step).to(x.dtype)


class _QuantizeFixed(torch.autograd.Function):
    """Rounds forward, and passes gradients on inside a range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: TensorLevels, by_input: bool) -> Tensor:
        step, lo, hi, low, high = levels
        y = quantized(x, step, lo, hi)
        values = x if by_input else y
        # Code for AVX2 reads booleans one after the other, and bytes at half the speed of floats.
        kept = x.dtype if x.device.type == "cpu" else torch.uint8
        above_and_below = torch.minimum(torch.sign(values - low), torch.sign(high - values))
        ctx.save_for_backward(above_and_below.clamp(min=0.0).to(kept))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None


def quantize_fixed(x: Tensor, levels: TensorLevels, *, by_input: bool) -> Tensor:
    """Quantize activations by fixed levels.

    Args:
        x: activations of any shape.
        levels: the step and the levels.
        by_input: whether gradients pass where x lies within `low` and `high`, or where the result does.
    """
    return _QuantizeFixed.apply(x, levels, by_input)  # pyright: ignore[reportReturnType]
