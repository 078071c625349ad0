"""What images show where masks cover them.

Certification holds for every fill that depends on visible pixels alone: a patch under a mask then changes nothing.
Which fill proves most depends on the pictures, and on what the network was trained on (docs/results/certified.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

MaskFillKind: TypeAlias = Literal["mean", "interpolate"]
"""The mean color, as PatchCleanser shows it, or pixels interpolated from the visible ones."""

LEVELS = 255
"""Pixels are interpolated between 8-bit levels, so that exported files, which may take bytes, see the same."""


@dataclass(frozen=True, eq=False)
class MaskFill:
    """Lays masks over images and fills them.

    Args:
        color: (C, 1, 1) in [0, 1]. `mean` shows it; `interpolate` does where a pixel has no visible one in its row and
            column.
        kind: `mean`, or `interpolate`: the mean of the nearest visible pixels to the left, right, above and below,
            weighted by the inverse of their distance (Shepard 1968) and rounded to 8 bit.
    """

    color: Tensor
    kind: MaskFillKind = "mean"

    def to(self, device: torch.device) -> MaskFill:
        """Return it with its color on a device."""
        return MaskFill(self.color.to(device), self.kind)

    def cover(self, images: Tensor, covered: Tensor) -> Tensor:
        """Return images under masks. Gradients reach the visible pixels.

        Args:
            images: (N, C, H, W) in [0, 1].
            covered: boolean (N, 1, H, W), True where a mask lies.
        """
        shown = self.color if self.kind == "mean" else _interpolated(images, covered, self.color)
        return torch.where(covered, shown, images)


def _interpolated(images: Tensor, covered: Tensor, color: Tensor) -> Tensor:
    """(N, C, H, W) in [0, 1]: at covered places the mean of the nearest visible pixels, elsewhere anything."""
    levels = images * LEVELS
    # Exactly whole, as exported files have them; gradients pass straight through.
    levels = levels + (levels.round() - levels).detach()
    total, weights = torch.zeros_like(images), torch.zeros_like(images[:, :1])
    for dim in (2, 3):
        for place, distance in _nearest_visible(covered, dim):
            # Distance 0 stands for none on this side.
            weight = torch.where(distance > 0, 1 / distance.to(images.dtype).clamp(min=1), 0.0)
            total = total + weight * levels.gather(dim, place.expand_as(images))
            weights = weights + weight
    mean = total / weights.clamp(min=torch.finfo(images.dtype).tiny)
    mean = mean + (mean.round() - mean).detach()
    return torch.where(weights > 0, mean / LEVELS, color)


def _nearest_visible(covered: Tensor, dim: int) -> list[tuple[Tensor, Tensor]]:
    """The nearest visible pixels before and after each pixel along a dimension of (N, 1, H, W).

    Returns two pairs of their places and their distances, (N, 1, H, W) int64; distance 0 where there is none, and at
    visible pixels.
    """
    length = covered.shape[dim]
    shape = [1, 1, 1, 1]
    shape[dim] = length
    here = torch.arange(length, device=covered.device).view(shape).expand_as(covered)
    before = torch.where(covered, -1, here).cummax(dim).values
    after = torch.where(covered, length, here).flip(dim).cummin(dim).values.flip(dim)
    none_before, none_after = before < 0, after == length
    return [
        (before.clamp(min=0), torch.where(none_before, 0, here - before)),
        (after.clamp(max=length - 1), torch.where(none_after, 0, after - here)),
    ]
