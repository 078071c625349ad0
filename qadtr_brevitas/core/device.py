"""Choose the device to compute on, and keep freed memory of the CPU for the next tensor."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

from qadtr_brevitas.core.errors import UsageError

if TYPE_CHECKING:
    import torch

_DEVICE = re.compile(r"cpu|mps|cuda(?::(\d+))?")


def resolve_device(name: str = "auto") -> torch.device:
    """Turn `auto`, `cpu`, `cuda`, `cuda:N` or `mps` into a device that exists; `auto` takes cuda, then mps, then cpu.

    On GPUs convolutions are set to compute in full float32: TF32, the default of PyTorch, rounds quantized operands
    to 10 bit, which moves some of them to other levels.

    Raises:
        UsageError: the name cannot be read, or this computer has no such device (those it has are named).
    """
    import torch

    torch.backends.cudnn.allow_tf32 = False
    existing = _existing()
    if name == "auto":
        return torch.device(next(device for device in ("cuda:0", "mps", "cpu") if device in existing))
    match = _DEVICE.fullmatch(name)
    if match is None:
        raise UsageError(f"{name!r} is not a device: use auto, cpu, cuda, cuda:N or mps")
    wanted = "cuda:0" if name == "cuda" else f"cuda:{int(match[1])}" if match[1] else name
    if wanted not in existing:
        raise UsageError(f"this machine has no device {name!r}: choose auto or {', '.join(existing)}")
    return torch.device(wanted)


def has_fast_bf16(device: torch.device | str) -> bool:
    """Whether a device is a CPU with units for matrices of bfloat16 (AMX), which multiply faster than float32."""
    import torch

    # torch 2.9 does not tell.
    capabilities: Callable[[], dict[str, bool]] = getattr(torch.cpu, "get_capabilities", dict)
    return torch.device(device).type == "cpu" and bool(capabilities().get("amx_bf16"))


def missing_compiler(device: torch.device | str) -> str | None:
    """Return a sentence on what torch.compile lacks on this machine to compile for a device; None if it lacks nothing.

    It needs Triton for CUDA, and a C++ compiler for all else.
    """
    import torch

    if torch.device(device).type == "cuda":
        return None if find_spec("triton") else "Triton is not installed (pip install triton)"
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler):
        return None
    return f"there is no C++ compiler {compiler!r} on this machine (CXX names another)"


def has_compiler(device: torch.device | str = "cpu") -> bool:
    """Return whether torch.compile has what it needs on this machine to compile for a device."""
    return missing_compiler(device) is None


def _existing() -> list[str]:
    import torch

    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return [*devices, "mps"] if torch.backends.mps.is_available() else devices


# The first two are from malloc.h; larger blocks than 1 GiB are too few to be worth keeping.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _KEPT = -1, -3, 1 << 30
_CHOSEN_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Make glibc keep up to 1 GiB of freed memory in this process, to use it for the next tensor.

    By default glibc returns large blocks to the system at once, so that each activation is fetched anew, page by page,
    and filled with zeros: a twentieth to a tenth of the time of scoring a ResNet-20 on a CPU (docs/results/exports.md).

    The command line calls this function; programs that use the package may. It does nothing without glibc, or if an
    environment variable of glibc sets these limits.

    Returns:
        Whether freed memory is kept.
    """
    if any(name in os.environ for name in _CHOSEN_BY_USER):
        return False
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return mallopt(_M_TRIM_THRESHOLD, _KEPT) == 1 and mallopt(_M_MMAP_THRESHOLD, _KEPT) == 1
