"""One kernel forward and one back for the quantizer of activations, which torch.compile makes of its formulas.

Eager mode runs a chain of kernels on GPUs, each of which reads and writes all values, and one that keeps to the cache
on CPUs. The eager functions of `quant/fake_quantize.py` are the reference, and what runs where Triton or a C++ compiler
is missing or fails. On CPUs they are the default too: compiling takes some seconds, and sums of the step's gradient
round differently.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from qadtr_brevitas.core.device import missing_compiler
from qadtr_brevitas.quant.tensor_levels import quantized


class FusedKernels:
    """The compiled forward and backward of quantization with one step.

    Values are seen as a vector, and levels are tensors, so that one graph for each type of numbers serves all shapes,
    layouts and bit-widths.

    Args:
        backend: of torch.compile.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self._quantize: Callable[..., Tensor] = torch.compile(quantized, backend=backend)
        self._gradients: Callable[..., Any] = torch.compile(_gradients, backend=backend)

    def forward(self, x: Tensor, scale: Tensor, lo: int, hi: int) -> Tensor:
        """Return x rounded to the levels lo * scale ... hi * scale, in its own type and layout."""
        x = dense(x.detach())
        return _shaped(self._quantize(_vector(x), _number(scale), *_levels(lo, hi, x.device)), x)

    def backward(self, g: Tensor, x: Tensor, scale: Tensor, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """Return the gradient of x, and the step times the gradient of the step.

        Args:
            g: gradient of the result.
            x: the values, whose place in the range decides where g passes; or the result in their place.
            scale: the step.
            lo: lowest integer level.
            hi: highest integer level.
        """
        x = dense(x.detach())
        arriving = _vector(_as_laid_out(g.detach(), x))
        found, dot = self._gradients(arriving, _vector(x), _number(scale), *_levels(lo, hi, x.device))
        return _shaped(found, x), dot


class FusedRowKernels:
    """The compiled forward and backward of quantization with a step for each row, as weights have.

    Args:
        backend: of torch.compile.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self._quantize: Callable[..., Tensor] = torch.compile(quantized, backend=backend)
        self._gradients: Callable[..., Any] = torch.compile(_row_gradients, backend=backend)

    def forward(self, rows: Tensor, steps: Tensor, lo: int, hi: int) -> Tensor:
        """Return rows (R, K) rounded to the levels lo ... hi of their steps (R, 1)."""
        return self._quantize(_matrix(rows), _matrix(steps), *_levels(lo, hi, rows.device))

    def backward(self, g: Tensor, rows: Tensor, steps: Tensor, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """Return the gradients of rows (R, K) and of steps (R, 1), given that of the result."""
        return self._gradients(*map(_matrix, (g, rows, steps)), *_levels(lo, hi, rows.device))


_Kernels = TypeVar("_Kernels", FusedKernels, FusedRowKernels)


def fused_kernels(x: Tensor) -> FusedKernels | None:
    """Return the kernels for a tensor; None where eager mode is to compute."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if x.is_cuda:
        return _kernels(x.device)
    on_cpu = CpuFusion.is_fused and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    return _kernels(x.device) if on_cpu else None


def fused_row_kernels(w: Tensor) -> FusedRowKernels | None:
    """Return the kernels for a weight; None where eager mode is to compute."""
    return None if fused_kernels(w) is None else _row_kernels(w.device)


class CpuFusion:
    """Whether kernels are fused on CPUs: in all threads, because autograd runs backward passes in others."""

    is_fused = False


@contextmanager
def fused_on_cpu() -> Generator[None]:
    """Let quantizers run as fused kernels on CPUs inside a block, in all threads."""
    before, CpuFusion.is_fused = CpuFusion.is_fused, True
    try:
        yield
    finally:
        CpuFusion.is_fused = before


@cache
def _kernels(device: torch.device) -> FusedKernels | None:
    """Return kernels that work on a device, tried on a few values."""
    if missing := missing_compiler(device):
        # A CPU has fused kernels only where they were asked for, and whoever asks tells what is missing.
        if device.type == "cuda":
            _warn(device, missing)
        return None
    x = torch.linspace(-1, 1, 64, device=device)
    return _tried(FusedKernels(), x, x.new_tensor(0.25))


@cache
def _row_kernels(device: torch.device) -> FusedRowKernels | None:
    """Return kernels that work on a device, tried on a few values."""
    rows = torch.linspace(-1, 1, 64, device=device).view(4, 16)
    return _tried(FusedRowKernels(), rows, torch.full((4, 1), 0.25, device=device))


def _tried(kernels: _Kernels, x: Tensor, steps: Tensor) -> _Kernels | None:
    """Return kernels that work on some values; None, with a warning, where the compiler fails."""
    try:
        kernels.backward(kernels.forward(x, steps, -2, 1), x, steps, -2, 1)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        _warn(x.device, f"torch.compile fails ({reason})")
        return None
    return kernels


def _warn(device: torch.device, reason: str) -> None:
    warnings.warn(f"quantizers run as several kernels on {device}: {reason}", stacklevel=4)


def _gradients(g: Tensor, x: Tensor, step: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    # Rounded again: memory, and not arithmetic, is what a kernel waits for. What is rounded already stays.
    y = quantized(x, step, lo, hi)
    # Ends are rounded as y is.
    low, high = (lo * step).to(x.dtype), (hi * step).to(x.dtype)
    dx = torch.where((x > low) & (x < high), g, torch.zeros_like(g))
    return dx, (g.float() * y.float() - dx.float() * x.float()).sum()


def _row_gradients(g: Tensor, rows: Tensor, steps: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    levels = rows / steps
    dw = torch.where((levels > lo) & (levels < hi), g, torch.zeros_like(g))
    return dw, (g * torch.clamp(torch.round(levels), lo, hi) - dw * levels).sum(dim=1, keepdim=True)


def dense(x: Tensor) -> Tensor:
    """Return a tensor whose values lie in memory without gaps, in whatever order."""
    # What is like a tensor with gaps has none, and so other strides.
    is_dense = x.is_contiguous() or torch.empty_like(x).stride() == x.stride()
    return x if is_dense else x.contiguous()


def _vector(x: Tensor) -> Tensor:
    vector = x.as_strided((x.numel(),), (1,))
    torch._dynamo.maybe_mark_dynamic(vector, 0)  # pyright: ignore
    return vector


def _matrix(rows: Tensor) -> Tensor:
    torch._dynamo.maybe_mark_dynamic(rows, (0, 1))  # pyright: ignore
    return rows


def _shaped(vector: Tensor, like: Tensor) -> Tensor:
    return vector.as_strided(like.shape, like.stride())


def _as_laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)


def _number(scale: Tensor) -> Tensor:
    return scale.detach().reshape(()).float()


@cache
def _levels(lo: int, hi: int, device: torch.device) -> tuple[Tensor, Tensor]:
    # Copied to the device once.
    return torch.tensor(float(lo), device=device), torch.tensor(float(hi), device=device)
