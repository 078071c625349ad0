"""Convolutions of 8-bit integers on CPUs, for passes without gradients: exact sums, several times as fast as floats.

Both operands of a quantized convolution are integers times steps, so that it is a convolution of integers, which oneDNN
computes with the dot products of VNNI and AMX, times the product of the steps. That is what an accelerator computes;
PyTorch's convolution of floats rounds each sum. On older CPUs oneDNN's sums may overflow: what a CPU computes is
compared with exact sums before it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from qadtr_brevitas.quant.tensor_levels import IntegerProduct

Layout: TypeAlias = tuple[Sequence[int], Sequence[int], Sequence[int], int]
"""Stride, padding and dilation, of rows and columns, and groups."""

LARGEST_INPUT, LARGEST_WEIGHT = 255, 128
ZERO_OF_SIGNED = 128
"""The code of 0 where levels lie on both sides of it."""


@torch.library.custom_op("qadtr_brevitas::integer_conv2d", mutates_args=())
def integer_conv2d(
    codes: Tensor, weight: Tensor, zero: int, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    """Convolve integers, as an operation that compilers leave alone.

    Args:
        codes: uint8 (N, in, H, W), levels plus `zero`.
        weight: int8 (out, in / groups, height, width).
        zero: the code of 0, which also surrounds the image.
        stride: and the others as in torch's conv2d.
        padding: rows and columns.
        dilation: rows and columns.
        groups: of channels.

    Returns:
        The sums in float32, (N, out, H', W'), in channels-last format.
    """
    one, shape = torch.ones(len(weight)), list(codes.shape)
    ops: Any = torch.ops.onednn
    packed = ops.qconv_prepack(weight, one, 1.0, zero, stride, padding, dilation, groups, shape)
    none = torch.zeros(len(weight), dtype=torch.int32)
    layout = stride, padding, dilation, groups
    codes = codes.contiguous(memory_format=torch.channels_last)
    sums = ops.qconv2d_pointwise(
        codes, 1.0, zero, packed, one, none, None, *layout, 1.0, 0, torch.float32, "none", [], ""
    )
    return sums.contiguous(memory_format=torch.channels_last)


@integer_conv2d.register_fake
def _(
    codes: Tensor, weight: Tensor, zero: int, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    like = codes.new_empty(codes.shape, dtype=torch.float32, device="meta")
    kernel = weight.new_empty(weight.shape, dtype=torch.float32, device="meta")
    shape = conv2d(like, kernel, None, stride, padding, dilation, groups).shape
    return codes.new_empty(shape, dtype=torch.float32).contiguous(memory_format=torch.channels_last)


def integer_product(x: Tensor, found: IntegerProduct, bias: Tensor | None, layout: Layout) -> Tensor:
    """Return what a convolution computes of quantized activations, by a convolution of integers.

    Args:
        x: activations (N, in, H, W), each on a level of their quantizer.
        found: the weight as integers, and the steps.
        bias: (out,).
        layout: stride, padding, dilation and groups, as in torch's conv2d.
    """
    # A product finds the same level as a quotient, in a tenth of the time.
    codes = (torch.round(x * found.per_step) + found.zero).to(torch.uint8)
    stride, padding, dilation, groups = layout
    sums = integer_conv2d(codes, found.levels, found.zero, list(stride), list(padding), list(dilation), groups)
    y = sums * found.steps
    return y if bias is None else y + bias.view(1, -1, 1, 1)


@cache
def sums_are_exact() -> bool:
    """Return whether oneDNN's convolutions of 8-bit integers are there, and compute the sums exactly, on this CPU."""
    # Builds of torch for other processors have no such operation.
    if not hasattr(torch.ops.onednn, "qconv2d_pointwise"):
        return False
    draws = torch.Generator().manual_seed(0)
    try:
        for zero, groups in ((0, 1), (ZERO_OF_SIGNED, 1), (ZERO_OF_SIGNED, 64)):
            # Mostly the largest values, whose sums of pairs overflow 16 bit.
            codes = torch.randint(200, LARGEST_INPUT + 1, (2, 64, 6, 6), generator=draws, dtype=torch.uint8)
            weight = torch.randint(90, LARGEST_WEIGHT, (64, 64 // groups, 3, 3), generator=draws, dtype=torch.int8)
            weight[::3] *= -1
            sums = integer_conv2d(codes, weight, zero, [1, 1], [1, 1], [1, 1], groups)
            if not torch.equal(sums, conv2d(codes.double() - zero, weight.double(), None, 1, 1, 1, groups).float()):
                return False
    # Torch does not keep the arguments of this operation from version to version.
    except RuntimeError:
        return False
    return True
