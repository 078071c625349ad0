"""Masks over images of which at least one covers any patch of a size, wherever it lies.

PatchCleanser's covering set (Xiang et al. 2022, section 3.2): certification looks at images under these masks, and
masked training shows them to a network beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.patch_size import PatchSize, PatchSizeLike

MASKS_PER_SIDE = 6


@dataclass(frozen=True, eq=False)
class CoveringSet:
    """Rectangular masks, one for each pair of an interval of rows and one of columns.

    Args:
        patch: size of the patches that it covers.
        rows: boolean (R, H), the rows of each mask.
        columns: boolean (C, W), the columns of each mask.
    """

    patch: PatchSize
    rows: Tensor
    columns: Tensor

    @cached_property
    def masks(self) -> Tensor:
        """Boolean (R * C, H, W), True where an image is covered; row intervals come first."""
        # (R, 1, H, 1) and (1, C, 1, W): every pair of an interval of rows and one of columns.
        return (self.rows[:, None, :, None] & self.columns[None, :, None, :]).flatten(0, 1)


def covering_set(image_size: tuple[int, int], patch: PatchSizeLike, *, per_side: int = MASKS_PER_SIDE) -> CoveringSet:
    """Return masks of which one covers all of a rectangular patch, wherever it lies.

    Along a side of n pixels with k masks the stride is s = ceil((n - p + 1) / k) for a patch of p pixels, and a mask is
    p + s - 1 pixels long: a patch that begins in a stride ends in its mask.

    Args:
        image_size: (H, W) in pixels.
        patch: the size, as 5 or (3, 10).
        per_side: masks along each side; more of them are smaller and cost more.

    Raises:
        UsageError: the patch is larger than the image.
    """
    size = PatchSize.parse(patch)
    check_fits(image_size, size)
    height, width = image_size
    return CoveringSet(size, _along(height, size.height, per_side), _along(width, size.width, per_side))


def covering_masks(image_size: tuple[int, int], patch: PatchSizeLike, *, per_side: int = MASKS_PER_SIDE) -> Tensor:
    """Return the masks of `covering_set`, boolean (M, H, W); M is at most `per_side` squared.

    Raises:
        UsageError: the patch is larger than the image.
    """
    return covering_set(image_size, patch, per_side=per_side).masks


def covered_places(masks: Tensor, patch: PatchSizeLike) -> Tensor:
    """Return which masks cover a patch wholly, boolean (rows, columns, M) for every place of its upper left corner.

    Args:
        masks: boolean (M, H, W).
        patch: its size.
    """
    size = PatchSize.parse(patch)
    # Covered pixels above and to the left of each corner, so that large patches take no longer than small ones.
    area = pad(masks.long(), (1, 0, 1, 0)).cumsum(1).cumsum(2)
    lower, upper = area[:, size.height :], area[:, : -size.height]
    counts = lower[:, :, size.width :] - lower[:, :, : -size.width] - upper[:, :, size.width :]
    counts = counts + upper[:, :, : -size.width]
    return (counts == size.pixels).permute(1, 2, 0)


def check_fits(image_size: tuple[int, int], patch: PatchSize) -> None:
    """Check that a patch is not larger than the images, (H, W) in pixels.

    Raises:
        UsageError: it is.
    """
    height, width = image_size
    if patch.height > height or patch.width > width:
        most = min(image_size)
        raise UsageError(
            f"a patch of {patch} pixels does not fit on images of {height}x{width}: choose from 1 to {most} pixels"
        )


def check_covers(masks: Tensor, patch: PatchSizeLike) -> None:
    """Check that wherever a patch lies one mask covers all of it.

    Args:
        masks: boolean (M, H, W).
        patch: its size.

    Raises:
        UsageError: there is a place that no mask covers, which is named.
    """
    size = PatchSize.parse(patch)
    open_places = (~covered_places(masks, size).any(dim=2)).nonzero()
    if len(open_places):
        row, column = open_places[0].tolist()
        raise UsageError(
            f"no mask covers a patch of {size} pixels at {row},{column} (row, column of the upper left corner), which "
            f"proves nothing: certify against a smaller patch, or take covering_masks(image_size, {str(size)!r})"
        )


def mean_color(mean: Sequence[float]) -> Tensor:
    """Return the color of what is covered, (C, 1, 1) in [0, 1]: zero after normalization, it tells a network least."""
    return torch.tensor(mean).view(-1, 1, 1)


def _along(side: int, patch: int, count: int) -> Tensor:
    """Boolean (k, side): which pixels of a side each mask covers."""
    stride = -(-(side - patch + 1) // count)
    length = patch + stride - 1
    starts = torch.tensor(sorted({min(start, side - length) for start in range(0, side - patch + 1, stride)}))
    pixels = torch.arange(side)
    return (pixels >= starts[:, None]) & (pixels < starts[:, None] + length)
