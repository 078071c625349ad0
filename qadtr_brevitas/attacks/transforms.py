"""Rotation, scaling and relighting of patches: for each image its own way, differentiable in the texture.

A pixel of the result belongs to the patch if and only if its center comes from a pixel of the mask: masks stay exact.
Inside, colors are interpolated between pixels of the mask alone, so that nothing from outside it bleeds in.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from qadtr_brevitas.attacks.shapes import bounding_box


def transform_patch(
    texture: Tensor, mask: Tensor, *, size: tuple[int, int], degrees: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotate and scale a patch about its middle, once per image, and shift it within windows of one size.

    Args:
        texture: (3, h, w) in [0, 1].
        mask: boolean (h, w).
        size: (H', W') of the windows, in pixels; what lies outside is cut off.
        degrees: (N,) rotation, counterclockwise as seen.
        scale: (N,) positive.
        shift: (N, 2) pixels, down and to the right, from the middle of the window to the middle of the patch.

    Returns:
        Textures (N, 3, H', W') in [0, 1] and boolean masks (N, H', W').
    """
    grid = F.affine_grid(
        _inverse_maps(_size(mask), size, degrees, scale, shift), [len(degrees), 1, *size], align_corners=False
    )
    weight = mask.to(texture.dtype)
    weighted = torch.cat([texture * weight, weight[None]]).expand(len(degrees), -1, -1, -1)
    drawn = F.grid_sample(weighted, grid, mode="bilinear", align_corners=False)
    nearest = F.grid_sample(weighted[:, 3:], grid, mode="nearest", align_corners=False)
    # A pixel whose center lies in the mask gets at least a quarter of its weight from there.
    return drawn[:, :3] / drawn[:, 3:].clamp(min=0.25), nearest[:, 0] > 0


def rotate_patch(texture: Tensor, mask: Tensor, degrees: float) -> tuple[Tensor, Tensor]:
    """Rotate a patch about its middle, and return it in the smallest box that holds it.

    Multiples of 90 degrees move pixels without a change. At other angles colors are interpolated and off the 8-bit
    grid, and the number of pixels may differ by a few.

    Args:
        texture: (3, h, w) in [0, 1].
        mask: boolean (h, w).
        degrees: counterclockwise as seen.

    Returns:
        Texture (3, h', w') and boolean mask (h', w').
    """
    cosine, sine = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    height, width = mask.shape
    # Rounding errors must not make a box larger where the sides are whole numbers.
    size = math.ceil(height * cosine + width * sine - 1e-6), math.ceil(width * cosine + height * sine - 1e-6)
    one = texture.new_ones(1)
    textures, masks = transform_patch(
        texture, mask, size=size, degrees=one * degrees, scale=one, shift=texture.new_zeros(1, 2)
    )
    row, column, height, width = bounding_box(masks[0])
    inside = slice(row, row + height), slice(column, column + width)
    return textures[0][:, *inside], masks[0][inside]


def relight(textures: Tensor, *, contrast: Tensor, brightness: Tensor) -> Tensor:
    """Return textures (N, 3, h, w) times `contrast` (N,) plus `brightness` (N,), clipped to [0, 1]."""
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
