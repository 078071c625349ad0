"""Masks of which at least one covers any patch of a given size (PatchCleanser, Xiang et al. 2022, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from qadtr_brevitas.errors import UsageError

MASKS_PER_SIDE = 6


def covering_masks(image_size: tuple[int, int], patch: int, *, per_side: int = MASKS_PER_SIDE) -> Tensor:
    """Square-like masks, wherever a square patch lies one of them covers all of it.

    Along a side of n pixels with k masks the stride is s = ceil((n - p + 1) / k) for a patch of p pixels, and a mask is
    p + s - 1 pixels long: a patch that begins in a stride ends in its mask.

    Args:
        image_size: (H, W) in pixels.
        patch: side of the patch in pixels.
        per_side: masks along each side; more of them are smaller and cost more.

    Returns:
        Boolean (M, H, W), True where an image is covered; M is at most `per_side` squared.

    Raises:
        UsageError: the patch is larger than the image.
    """
    if not 1 <= patch <= min(image_size):
        raise UsageError(
            f"a patch of {patch}x{patch} pixels does not fit on images of {image_size[0]}x{image_size[1]}: certify "
            f"against 1 to {min(image_size)} pixels"
        )
    rows, columns = (_along(side, patch, per_side) for side in image_size)
    # (R, 1, H, 1) and (1, C, 1, W): every pair of a row and a column of masks.
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(0, 1)


def _along(side: int, patch: int, count: int) -> Tensor:
    """Boolean (k, side): which pixels of a side each mask covers."""
    stride = -(-(side - patch + 1) // count)
    length = patch + stride - 1
    starts = torch.tensor(sorted({min(start, side - length) for start in range(0, side - patch + 1, stride)}))
    pixels = torch.arange(side)
    return (pixels >= starts[:, None]) & (pixels < starts[:, None] + length)
