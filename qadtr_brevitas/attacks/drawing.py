"""How images of any number of channels are drawn on a screen, which has three colors."""

from __future__ import annotations

import torch
from torch import Tensor


def as_rgb(image: Tensor) -> Tensor:
    """Return an image (C, h, w) as (C, h, w): its first three channels, or of fewer than three their mean as gray."""
    if image.shape[0] >= 3:
        return image[:3]
    return image.mean(0, keepdim=True).expand(3, -1, -1)


def as_rgba(image: Tensor, mask: Tensor) -> Tensor:
    """Return an image (C, h, w) in [0, 1] as (4, h, w), transparent outside a boolean mask (h, w)."""
    return torch.cat([as_rgb(image), mask[None].to(image)])
