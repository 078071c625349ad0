"""Rotation, scaling and relighting of patches: for each image its own way, differentiable in the texture.

Masks stay exact: a pixel of the result belongs to the patch or it does not. Inside, colors are interpolated between
pixels of the mask alone, so that nothing from outside it bleeds in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qadtr_brevitas.attacks.shapes import bounding_box

_EQUAL_WEIGHTS = 1e9
"""Weights that differ by less than one in this many are equal."""


def transform_patch(
    texture: Tensor, mask: Tensor, *, size: tuple[int, int], degrees: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotate and scale a patch about its middle, once per image, and shift it within windows of one size.

    Args:
        texture: (C, h, w) in [0, 1].
        mask: boolean (h, w).
        size: (H', W') of the windows, in pixels; what lies outside is cut off.
        degrees: (N,) rotation, counterclockwise as seen.
        scale: (N,) positive.
        shift: (N, 2) pixels, down and to the right, from the middle of the window to the middle of the patch.

    Returns:
        Textures (N, C, H', W') in [0, 1] and boolean masks (N, H', W').
    """
    grid = _sampling_grid(mask, size, degrees, scale, shift)
    weighted, weights = _interpolated(texture, mask, grid)
    alone = mask.to(texture.dtype).expand(len(degrees), 1, -1, -1)
    nearest = F.grid_sample(alone, grid, mode="nearest", align_corners=False)
    # A pixel whose center lies in the mask gets at least a quarter of its weight from there.
    return weighted / weights[:, None].clamp(min=0.25), nearest[:, 0] > 0


@dataclass(frozen=True)
class RotatedPatch:
    """A rotated patch in the smallest box that holds it.

    Args:
        texture: (C, h, w) in [0, 1].
        mask: boolean (h, w).
        offset: rows and columns from the top left pixel of the patch as it was to that of this box.
    """

    texture: Tensor
    mask: Tensor
    offset: tuple[int, int]


def rotate_patch(texture: Tensor, mask: Tensor, degrees: float) -> RotatedPatch:
    """Rotate a patch about its middle, which stays where it is on the grid of pixels.

    Multiples of 90 degrees move pixels without a change. At other angles colors are interpolated and off the 8-bit
    grid. The number of pixels never changes: those are covered whose centers lie deepest in the rotated mask.

    A patch with an odd and an even side cannot lie on its side about its middle: it then lies half a pixel up and half
    a pixel to the left.

    Args:
        texture: (C, h, w) in [0, 1].
        mask: boolean (h, w).
        degrees: counterclockwise as seen.
    """
    size = _rotation_window(_size(mask), degrees)
    one = torch.ones(1, dtype=torch.float64, device=mask.device)
    grid = _sampling_grid(mask, size, one * degrees, one, one.new_zeros(1, 2))
    weighted, weights = (drawn[0] for drawn in _interpolated(texture.double(), mask, grid))
    rotated = _deepest(weights, int(mask.sum()))
    row, column, height, width = bounding_box(rotated)
    box = slice(row, row + height), slice(column, column + width)
    top, left = ((before - after) // 2 for before, after in zip(mask.shape, size, strict=True))
    colors = weighted[:, *box] / weights[box].clamp(min=torch.finfo(weights.dtype).tiny)
    return RotatedPatch(colors.clamp(0, 1).to(texture.dtype), rotated[box], (top + row, left + column))


def _rotation_window(patch_size: tuple[int, int], degrees: float) -> tuple[int, int]:
    """Return a window (height, width) that holds a patch rotated about the middle of the window.

    Its sides are even or odd as those of the patch are, so that both have their middles on a pixel, or between two.
    """
    height, width = patch_size
    cosine, sine = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    # One pixel more on every side: a mask of the same number of pixels may reach over the turned border.
    extents = math.ceil(height * cosine + width * sine) + 2, math.ceil(width * cosine + height * sine) + 2
    own_sides = (height, width) if cosine >= sine else (width, height)
    rows, columns = (extent + (extent - own) % 2 for extent, own in zip(extents, own_sides, strict=True))
    return rows, columns


def _deepest(weights: Tensor, pixels: int) -> Tensor:
    """Return the mask of the `pixels` largest weights (h, w)."""
    flat = weights.flatten()
    numbers = torch.arange(len(flat), device=flat.device)
    # Of equal weights, pixels that a half turn exchanges are taken together, or the mask would lose its symmetry.
    order = torch.minimum(numbers, numbers.flip(0)).argsort(stable=True)
    # Rounded, because weights that are equal on paper differ by a rounding error.
    order = order[flat[order].mul(_EQUAL_WEIGHTS).round().argsort(descending=True, stable=True)]
    return torch.zeros_like(flat, dtype=torch.bool).index_fill(0, order[:pixels], True).view_as(weights)


def relight(textures: Tensor, *, contrast: Tensor, brightness: Tensor) -> Tensor:
    """Return textures (N, C, h, w) times `contrast` (N,) plus `brightness` (N,), clipped to [0, 1]."""
    return (textures * contrast.view(-1, 1, 1, 1) + brightness.view(-1, 1, 1, 1)).clamp(0, 1)


def turning_reach(mask: Tensor, degrees: float) -> tuple[float, float]:
    """Return how far a patch (h, w) reaches from its middle, rotated by at most +-`degrees`.

    Returns:
        (rows, columns) in pixels, up or down and sideways, to the border of the farthest pixel.
    """
    covered = mask.cpu().nonzero().double()
    middle = covered.new_tensor([(side - 1) / 2 for side in mask.shape])
    corners = covered.new_tensor([(-0.5, -0.5), (-0.5, 0.5), (0.5, -0.5), (0.5, 0.5)])
    offsets = (covered - middle)[:, None] + corners
    angles = torch.atan2(*offsets.abs().unbind(-1))
    most = math.radians(degrees)
    to_axes = torch.stack([math.pi / 2 - angles, angles], dim=-1)
    reach = offsets.norm(dim=-1, keepdim=True) * (to_axes - most).clamp(min=0).cos()
    rows, columns = reach.flatten(0, 1).amax(0).tolist()
    return rows, columns


def _size(mask: Tensor) -> tuple[int, int]:
    return mask.shape[0], mask.shape[1]


def _interpolated(texture: Tensor, mask: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Return sums (N, C, H, W) of the colors of the mask's pixels, by bilinear weights, and of the weights alone."""
    covered = mask.to(texture.dtype)
    both = torch.cat([texture * covered, covered[None]]).expand(len(grid), -1, -1, -1)
    drawn = F.grid_sample(both, grid, mode="bilinear", align_corners=False)
    return drawn[:, :-1], drawn[:, -1]


def _sampling_grid(mask: Tensor, size: tuple[int, int], degrees: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return where in the patch (h, w) each pixel of a window (H, W) comes from, (N, H, W, 2), for `grid_sample`."""
    maps = _inverse_maps(_size(mask), size, degrees, scale, shift)
    return F.affine_grid(maps, [len(degrees), 1, *size], align_corners=False)


def _inverse_maps(
    patch_size: tuple[int, int], size: tuple[int, int], degrees: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    """Return matrices (N, 2, 3) from a window to the patch, both in coordinates x, y from -1 to 1."""
    (height, width), (rows, columns) = patch_size, size
    cosine, sine = degrees.deg2rad().cos() / scale, degrees.deg2rad().sin() / scale
    down, right = shift.unbind(1)
    across = torch.stack([cosine * columns, -sine * rows, -2 * (cosine * right - sine * down)], dim=1) / width
    along = torch.stack([sine * columns, cosine * rows, -2 * (sine * right + cosine * down)], dim=1) / height
    return torch.stack([across, along], dim=1)
