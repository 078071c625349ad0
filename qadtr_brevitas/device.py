"""The device a command runs on."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from qadtr_brevitas.errors import UsageError

if TYPE_CHECKING:
    import torch

_DEVICE = re.compile(r"cpu|mps|cuda(?::(\d+))?")


def resolve_device(name: str = "auto") -> torch.device:
    """Turns `auto`, `cpu`, `cuda`, `cuda:N` or `mps` into a device that exists; `auto` takes cuda, then mps, then cpu.

    On GPUs convolutions are set to compute in full float32: TF32, which PyTorch would take, cuts quantized operands to
    10 bit and moves some of them to other levels.

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
        raise UsageError(f"device {name!r} cannot be read: use auto, cpu, cuda, cuda:N or mps")
    wanted = "cuda:0" if name == "cuda" else f"cuda:{int(match[1])}" if match[1] else name
    if wanted not in existing:
        raise UsageError(f"there is no device {name!r} here: choose auto or {', '.join(existing)}")
    return torch.device(wanted)


def has_fast_bf16(device: torch.device | str) -> bool:
    """Whether a device is a CPU with units for matrices of bfloat16 (AMX), which multiply faster than float32."""
    import torch

    return torch.device(device).type == "cpu" and bool(torch.cpu.get_capabilities().get("amx_bf16"))


def _existing() -> list[str]:
    import torch

    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return [*devices, "mps"] if torch.backends.mps.is_available() else devices
