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
from typing import Any

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

    def backward(
        self, g: Tensor, x: Tensor, y: Tensor | None, scale: Tensor, lo: int, hi: int
    ) -> tuple[Tensor, Tensor | None]:
        """Return the gradient of x, and the step times the gradient of the step.

        Args:
            g: gradient of the result.
            x: the values, whose place in the range decides where g passes.
            y: the result; None if the step takes no gradient.
            scale: the step.
            lo: lowest integer level.
            hi: highest integer level.
        """
        x = dense(x.detach())
        vectors = (_vector(_as_laid_out(t.detach(), x)) for t in (g, x if y is None else y))
        found, dot = self._gradients(*vectors, _vector(x), _number(scale), *_levels(lo, hi, x.device))
        return _shaped(found, x), None if y is None else dot


def fused_kernels(x: Tensor) -> FusedKernels | None:
    """Return the kernels for a tensor; None where eager mode is to compute."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if x.is_cuda:
        return _kernels(x.device)
    on_cpu = CpuFusion.is_fused and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    return _kernels(x.device) if on_cpu else None


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
    kernels = FusedKernels()
    try:
        x = torch.linspace(-1, 1, 64, device=device)
        y = kernels.forward(x, x.new_tensor(0.25), -2, 1)
        kernels.backward(x, x, y, x.new_tensor(0.25), -2, 1)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        _warn(device, f"torch.compile fails ({reason})")
        return None
    return kernels


def _warn(device: torch.device, reason: str) -> None:
    warnings.warn(f"quantizers run as several kernels on {device}: {reason}", stacklevel=3)


def _gradients(g: Tensor, y: Tensor, x: Tensor, step: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    # Ends are rounded as y is.
    low, high = (lo * step).to(x.dtype), (hi * step).to(x.dtype)
    dx = torch.where((x > low) & (x < high), g, torch.zeros_like(g))
    return dx, (g.float() * y.float() - dx.float() * x.float()).sum()


def dense(x: Tensor) -> Tensor:
    """Return a tensor whose values lie in memory without gaps, in whatever order."""
    # What is like a tensor with gaps has none, and so other strides.
    is_dense = x.is_contiguous() or torch.empty_like(x).stride() == x.stride()
    return x if is_dense else x.contiguous()


def _vector(x: Tensor) -> Tensor:
    vector = x.as_strided((x.numel(),), (1,))
    torch._dynamo.maybe_mark_dynamic(vector, 0)  # pyright: ignore
    return vector


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
