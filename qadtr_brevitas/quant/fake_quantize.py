"""Quantize-dequantize with learned-step gradients, in as few passes over memory as PyTorch's eager mode allows.

Forward: y = clamp(round(x / s), lo, hi) * s, rounding ties to even, as Brevitas and ONNX do.
Backward (LSQ, Esser et al. 2020): the input's gradient passes where lo < x/s < hi; the step's is the sum of
g * (y - x) / s inside and g * lo or g * hi outside.

The step gradient needs no mask or residual of its own: with dx the masked gradient, it is (<g, y> - <dx, x>) / s,
because y = lo * s or hi * s outside. So only x is kept besides y, which the next layer keeps anyway.

With y in the place of x the same formulas are those of PACT (Choi et al. 2018): the step learns from clipped values
only. At 8 bit and more, where rounding contributes only noise to the step's gradient, this saves keeping x.

Under autocast activations are bfloat16, which represents all integer levels up to 8 bit and rounds those above. In
blocks and in the fused kernels of GPUs (`quant/fused.py`) the step stays float32; otherwise it is rounded to bfloat16.

Gradients of gradients are the derivatives of these formulas: the mask and the integer levels round(x / s) are constant,
as they are almost everywhere. A backward pass that records a graph (`create_graph=True`) computes the formulas with
differentiable operations; any other backward pass takes the fast ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from qadtr_brevitas.quant.fused import dense, fused_kernels

Rounding: TypeAlias = Callable[[Tensor], Tensor]
"""A function from values in steps to levels in steps."""

# 256 kB of floats for each thread: its part of input and output stays in its core's L2 cache through all passes.
_PART = 1 << 16
_SMALLEST_HALF = 2.0**-24


class _QuantizeActivation(torch.autograd.Function):
    """Per-tensor quantization with one learned step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, lo: int, hi: int, keep_input: bool) -> Tensor:
        ctx.lo, ctx.hi, ctx.keep_input = lo, hi, keep_input
        ctx.blocks, ctx.fused = _is_blockable(x), fused_kernels(x)
        scale = _at_hand(scale)
        if ctx.fused is not None:
            y = ctx.fused.forward(x, scale, lo, hi)
        elif ctx.blocks:
            y = _quantize_blocks(x, scale.detach().reshape(()), lo, hi)
        else:
            step = _step(scale, x.dtype)
            y = torch.clamp_(torch.round_(x / step), lo, hi).mul_(step)
        if ctx.needs_input_grad[1] or not keep_input:
            ctx.save_for_backward(scale, y, *([x] if keep_input else []))
        else:
            ctx.save_for_backward(scale, x)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        scale, first, *rest = ctx.saved_tensors
        x = rest[0] if rest else first
        y = first if ctx.needs_input_grad[1] else None
        if torch.is_grad_enabled():
            dx, dscale = _differentiable_backward(grads[0], x, y, scale, (ctx.lo, ctx.hi), keep_input=ctx.keep_input)
            return dx, dscale, None, None, None
        if ctx.fused is not None:
            dx, dot = ctx.fused.backward(grads[0], x, scale, ctx.lo, ctx.hi)
            dot = dot if ctx.needs_input_grad[1] else None
        elif ctx.blocks:
            low, high = (_end(scale.reshape(()), level, x.dtype).item() for level in (ctx.lo, ctx.hi))
            dx, dot = _backward_blocks(_like(grads[0], x), x, y, low, high)
        else:
            low, high = (_end(_step(scale, x.dtype), level, x.dtype) for level in (ctx.lo, ctx.hi))
            dx, dot = _backward(grads[0], x, y, low, high)
        return dx, None if dot is None else (dot / scale).to(scale.dtype), None, None, None


class _QuantizeImages(torch.autograd.Function):
    """Quantization with a step of its own for each image, which takes no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, lo: int, hi: int, low: float, high: float) -> Tensor:
        ctx.low, ctx.high = low, high
        ctx.save_for_backward(*([] if low == -torch.inf and high == torch.inf else [x]))
        if _is_blockable(x) and is_first_outermost(x):
            y = torch.empty_like(x)
            source, target = (_flat(t).view(len(scale), -1) for t in (x, y))
            images = max(1, block_length() // source.shape[1])
            for s, t, step in zip(source.split(images), target.split(images), scale.split(images), strict=True):
                torch.div(s, step[:, None], out=t)
                t.round_().clamp_(lo, hi).mul_(step[:, None])
            return y
        step = _step_per_row(scale, x)
        return torch.clamp_(torch.round_(x / step), lo, hi).mul_(step)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        dx = grads[0]
        for x in ctx.saved_tensors:
            dx = torch.ops.aten.hardtanh_backward(dx, x, ctx.low, ctx.high)
        return dx, None, None, None, None, None


class _QuantizeBy(torch.autograd.Function):
    """Quantization by any rounding, with learned steps that broadcast to the values."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, scale: Tensor, rounding: Rounding, low: float, high: float) -> Tensor:
        rounded = rounding(w / scale)
        ctx.save_for_backward(rounded, w, scale)
        ctx.low, ctx.high = low, high
        return rounded * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        rounded, w, scale = ctx.saved_tensors
        return *learned_step_gradients(grads[0], w, scale, rounded, low=ctx.low, high=ctx.high), None, None, None


def learned_step_gradients(
    g: Tensor, x: Tensor, scale: Tensor, rounded: Tensor, *, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of values and of their steps (LSQ), themselves functions of g, x and the steps.

    Args:
        g: gradient of the quantized values.
        x: the values.
        scale: positive steps that broadcast to x.
        rounded: the values in steps, rounded.
        low: values at or below it, in steps, get no gradient.
        high: values at or above it, in steps, get no gradient.
    """
    levels = x / scale
    dx = g * ((levels > low) & (levels < high))
    return dx, (g * rounded - dx * levels).sum_to_size(scale.shape)


@torch.library.custom_op("qadtr_brevitas::copied", mutates_args=())
def _copied(scale: Tensor) -> Tensor:
    return scale.clone()


@_copied.register_fake
def _like_copied(scale: Tensor) -> Tensor:
    return torch.empty_like(scale)


def _at_hand(scale: Tensor) -> Tensor:
    """Return the step; where a CPU's loops are compiled, by an operation that these cannot repeat for every value."""
    is_compiled = torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
    return _copied(scale) if is_compiled and scale.device.type == "cpu" else scale


def _step(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the step in the activations' type; in float16, at least its smallest number."""
    step = scale.to(dtype)
    return step.clamp(min=_SMALLEST_HALF) if dtype == torch.float16 else step


def _step_per_row(scale: Tensor, x: Tensor) -> Tensor:
    """Return the step of each image, (images,), as one that broadcasts to x, whose rows are images or parts of them."""
    return _step(scale, x.dtype).repeat_interleave(len(x) // len(scale)).view(-1, *(1,) * (x.dim() - 1))


def quantize_activation(x: Tensor, scale: Tensor, lo: int, hi: int, *, keep_input: bool = True) -> Tensor:
    """Quantize activations to the levels lo * scale ... hi * scale.

    Args:
        x: activations of any shape.
        scale: the step, positive, one element.
        lo: lowest integer level, 0 for unsigned.
        hi: highest integer level.
        keep_input: the step's gradient is that of LSQ if true; that of PACT, which does not keep x, otherwise.

    Returns:
        A tensor like x with at most hi - lo + 1 distinct values.
    """
    if _is_blockable(x) or fused_kernels(x) is not None:
        # Parts of a joint query, key and value have gaps between them: a copy costs less than passes over memory.
        x = dense(x)
    return _QuantizeActivation.apply(x, scale, lo, hi, keep_input)  # pyright: ignore[reportReturnType]


def quantize_images(
    x: Tensor, scale: Tensor, lo: int, hi: int, *, low: float = -torch.inf, high: float = torch.inf
) -> Tensor:
    """Quantize each image of a batch with its own step.

    Args:
        x: activations; the first dimension is that of scale, or a multiple, image after image (windows, heads).
        scale: positive steps, (images,), such that lo * scale ... hi * scale covers each image. It takes no gradient.
        lo: lowest integer level, 0 for unsigned.
        hi: highest integer level.
        low: values at or below it get no gradient: 0 for unsigned levels.
        high: values at or above it get no gradient.

    Returns:
        A tensor like x, whose gradient passes to x between low and high.
    """
    return _QuantizeImages.apply(x, scale, lo, hi, low, high)  # pyright: ignore[reportReturnType]


def quantize_by(rounding: Rounding, x: Tensor, scale: Tensor, *, low: float, high: float) -> Tensor:
    """Quantize values by any rounding, with learned-step gradients (LSQ).

    Args:
        rounding: from values in steps to levels in steps.
        x: values of any shape.
        scale: positive steps that broadcast to x.
        low: values at or below it, in steps, get no gradient.
        high: values at or above it, in steps, get no gradient.
    """
    return _QuantizeBy.apply(x, scale, rounding, low, high)  # pyright: ignore[reportReturnType]


def quantize_images_by(rounding: Rounding, x: Tensor, scale: Tensor, *, low: float, high: float) -> Tensor:
    """Quantize each image of a batch by any rounding, with its own step.

    Args:
        rounding: from values in steps to levels in steps.
        x: activations as in `quantize_images`.
        scale: positive steps, (images,), without a gradient.
        low: values at or below it get no gradient.
        high: values at or above it get no gradient.
    """
    step = _step_per_row(scale, x)
    with torch.no_grad():
        y = rounding(x / step) * step
    passed = x * ((x > low) & (x < high))
    return y + (passed - passed.detach())


def _is_blockable(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
    )


def is_first_outermost(x: Tensor) -> bool:
    """Return whether the values of x[0], x[1] and so on lie one after the other in memory, without gaps."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def block_length() -> int:
    """Return the length of a block: every operation on one divides it among all threads in the same way."""
    return _PART * torch.get_num_threads()


def _flat(x: Tensor) -> Tensor:
    return x.as_strided((x.numel(),), (1,))


def _like(g: Tensor, x: Tensor) -> Tensor:
    # Gradients arrive in any layout (an expanded scalar after a mean, for instance).
    return g if g.stride() == x.stride() else torch.empty_like(x).copy_(g)


def _end(step: Tensor, level: int, dtype: torch.dtype) -> Tensor:
    # Rounded as y is. In bfloat16, values clipped to y would otherwise lie inside the range.
    return torch.full_like(step, level, dtype=dtype).mul_(step)


def _quantize_blocks(x: Tensor, step: Tensor, lo: int, hi: int) -> Tensor:
    # A Python number would be converted to a tensor in each block.
    y, block = torch.empty_like(x), block_length()
    for source, target in zip(_flat(x).split(block), _flat(y).split(block), strict=True):
        torch.div(source, step, out=target)
        target.round_().clamp_(lo, hi).mul_(step)
    return y


def _backward_blocks(g: Tensor, x: Tensor, y: Tensor | None, low: float, high: float) -> tuple[Tensor, Tensor | None]:
    if y is None:
        return torch.ops.aten.hardtanh_backward(g, x, low, high), None
    dx = torch.empty_like(x)
    total = torch.zeros((), dtype=torch.float64)
    blocks = (_flat(t).split(block_length()) for t in (g, x, y, dx))
    for g_block, x_block, y_block, dx_block in zip(*blocks, strict=True):
        torch.ops.aten.hardtanh_backward(g_block, x_block, low, high, grad_input=dx_block)
        total += _dot(g_block, y_block) - _dot(dx_block, x_block)
    return dx, total


def _dot(a: Tensor, b: Tensor) -> Tensor:
    # In bfloat16 it takes 30 times as long, and rounds more than the difference that it is needed for.
    return torch.dot(a.float(), b.float())


def _backward(g: Tensor, x: Tensor, y: Tensor | None, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
    dx = g * ((x > low) & (x < high))
    if y is None:
        return dx, None
    return dx, _sum(g * y - dx * x)


def _sum(values: Tensor) -> Tensor:
    """Return the sum over all values, in float32."""
    if torch.compiler.is_compiling() and values.dim() > 1:
        # By channels first, as the gradients of a norm's parameters: one loop then computes all of them.
        channel = 1 if values.dim() == 4 else values.dim() - 1
        values = values.sum([d for d in range(values.dim()) if d != channel], dtype=torch.float32)
    return values.sum(dtype=torch.float32)


def _differentiable_backward(
    g: Tensor, x: Tensor, y: Tensor | None, scale: Tensor, levels: tuple[int, int], *, keep_input: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of x and of the step, as functions of g, x and the step."""
    step = _step(scale.detach(), x.dtype)
    low, high = (_end(step, level, x.dtype) for level in levels)
    dx = g * ((x > low) & (x < high))
    if y is None:
        return dx, None
    rounded = (y.detach() / step).round()
    inside = x / scale if keep_input else rounded
    return dx, (g * rounded - dx * inside).sum(dtype=scale.dtype).reshape(scale.shape)
