"""Random streams that depend only on what they are for: (seed, names and counters), never on history.

A resumed run draws what an uninterrupted one would have drawn, because nothing about a stream has to be restored.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, *keys: int | str) -> int:
    """Return a 63-bit seed that is a fixed function of `seed` and `keys`, the same on every machine and rank."""
    text = "/".join(str(part) for part in (seed, *keys))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *keys: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a torch generator for one purpose: `generator(seed, "gir", step)`; add the rank if ranks must differ."""
    import torch

    return torch.Generator(device=device).manual_seed(derive_seed(seed, *keys))
