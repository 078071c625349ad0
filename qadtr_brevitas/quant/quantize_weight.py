"""Quantize-dequantize weights with learned-step gradients (LSQ), one step for each output channel, group or tensor.

The formulas are those of `quant/fake_quantize.py`. A large network has as many weights as activations, so they are
computed in tiles that stay in a core's cache, or by one fused kernel forward and one back. Nothing is kept but the
weight and its steps: levels are computed again for gradients.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qadtr_brevitas.quant.fake_quantize import block_length, is_first_outermost, learned_step_gradients, quantize_by
from qadtr_brevitas.quant.fused import fused_row_kernels

_SMALL = 1 << 15
"""Fewer weights are computed at once on CPUs: they take less time than the calls for a tile."""


class _Rows(NamedTuple):
    """A weight as a matrix (R, K), each row of which has one step, and the steps (R, 1)."""

    values: Tensor
    steps: Tensor


class _QuantizeRows(torch.autograd.Function):
    """Quantization with a step for each row of values in memory."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, scale: Tensor, lo: int, hi: int) -> Tensor:
        ctx.levels, ctx.fused = (lo, hi), fused_row_kernels(w)
        ctx.save_for_backward(w, scale)
        rows = _rows(w, scale)
        if ctx.fused is not None:
            return _shaped(ctx.fused.forward(rows.values, rows.steps, lo, hi), w)
        y = torch.empty_like(w)
        target = _rows(y, scale).values
        for tile, tall in _tiles(*rows.values.shape):
            step = rows.steps[tall]
            torch.div(rows.values[tile], step, out=target[tile])
            target[tile].round_().clamp_(lo, hi).mul_(step)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        w, scale = ctx.saved_tensors
        lo, hi = ctx.levels
        (g,) = grads
        if torch.is_grad_enabled():
            rounded = (w.detach() / scale.detach()).round().clamp(lo, hi)
            return *learned_step_gradients(g, w, scale, rounded, low=lo, high=hi), None, None
        if g.stride() != w.stride():
            g = torch.empty_like(w).copy_(g)
        rows, arriving = _rows(w, scale), _rows(g, scale).values
        gradients = _tiled_gradients if ctx.fused is None else ctx.fused.backward
        dw, dsteps = gradients(arriving, rows.values, rows.steps, lo, hi)
        return _shaped(dw, w), dsteps.view(scale.shape), None, None


def quantize_weight(w: Tensor, scale: Tensor, lo: int, hi: int) -> Tensor:
    """Quantize a weight, per output channel, per group of inputs or per tensor.

    Args:
        w: weight, (out, in, ...), or (out, groups, in / groups, ...).
        scale: positive steps that broadcast to w, e.g. (out, 1, 1, 1).
        lo: lowest integer level.
        hi: highest integer level.

    Returns:
        A tensor like w. Its gradients are those of learned steps (LSQ, Esser et al. 2020, eq. 3), without their scale.
    """
    if _has_rows(w, scale):
        return _QuantizeRows.apply(w, scale, lo, hi)  # pyright: ignore[reportReturnType]

    def rounding(levels: Tensor) -> Tensor:
        return torch.clamp(torch.round(levels), lo, hi)

    return quantize_by(rounding, w, scale, low=lo, high=hi)


def _has_rows(w: Tensor, scale: Tensor) -> bool:
    """Return whether the values of each step lie side by side in memory, so that the fast forms can compute them."""
    if w.dtype != torch.float32 or scale.dtype != torch.float32 or w.numel() == 0:
        return False
    if torch.jit.is_tracing() or torch.compiler.is_compiling() or (w.device.type == "cpu" and w.numel() < _SMALL):
        return False
    outer = next((d for d, size in enumerate(scale.shape) if size == 1), scale.dim())
    inner_is_shared = all(size == 1 for size in scale.shape[outer:])
    aligned = scale.numel() == 1 or (scale.dim() == w.dim() and scale.shape[:outer] == w.shape[:outer])
    in_order = w.is_contiguous() or (outer <= 1 and is_first_outermost(w))
    return inner_is_shared and aligned and in_order


def _rows(w: Tensor, scale: Tensor) -> _Rows:
    count = scale.numel()
    columns = w.numel() // count
    return _Rows(w.detach().as_strided((count, columns), (columns, 1)), scale.detach().reshape(count, 1))


def _shaped(rows: Tensor, like: Tensor) -> Tensor:
    return rows.as_strided(like.shape, like.stride())


def _tiles(count: int, columns: int) -> Generator[tuple[tuple[slice, slice], slice]]:
    """Yield tiles of a matrix that fit into the cache, each as rows and columns, and its rows again for the steps."""
    block = block_length()
    height, width = max(1, block // columns), min(columns, block)
    for top in range(0, count, height):
        tall = slice(top, top + height)
        for left in range(0, columns, width):
            yield (tall, slice(left, left + width)), tall


def _tiled_gradients(g: Tensor, w: Tensor, steps: Tensor, lo: int, hi: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of the values (R, K) and of the steps (R, 1)."""
    dw, dsteps = torch.empty_like(w), torch.zeros_like(steps)
    for tile, tall in _tiles(*w.shape):
        levels = w[tile] / steps[tall]
        torch.ops.aten.hardtanh_backward(g[tile], levels, lo, hi, grad_input=dw[tile])
        # The sum over both terms at once: apart they cancel.
        inside = dw[tile] * levels
        parts = levels.round_().clamp_(lo, hi).mul_(g[tile]).sub_(inside)
        dsteps[tall] += parts.sum(dim=1, keepdim=True)
    return dw, dsteps
