"""Which pixels a patch covers: masks of simple shapes, exact to the pixel, and the size that fits an area."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from qadtr_brevitas.core.errors import UsageError

Shape: TypeAlias = Literal["square", "rectangle", "disc"]

_SIZE_RULE = {
    "square": "single number, its side in pixels, such as size=8",
    "disc": "single number, its diameter in pixels, such as size=8",
    "rectangle": "height and a width in pixels, such as size=[6, 10]",
}


def shape_mask(shape: Shape, size: int | tuple[int, int]) -> Tensor:
    """Return the pixels that a shape covers.

    Args:
        shape: `square` and `disc` take one side or diameter in pixels; `rectangle` takes (height, width).
            A disc covers the pixels whose center lies in the circle.
        size: in pixels.

    Returns:
        Boolean mask (h, w).

    Raises:
        UsageError: the size does not go with the shape, or is not positive.
    """
    if isinstance(size, int) == (shape == "rectangle"):
        raise UsageError(f"size {size} does not fit shape {shape}: give a {_SIZE_RULE[shape]}")
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise UsageError(f"patch size {size} is too small: give at least 1 pixel a side")
    if shape != "disc":
        return torch.ones(height, width, dtype=torch.bool)
    # Twice the distances, so that everything stays an exact integer.
    offsets = 2 * torch.arange(height) - (height - 1)
    return offsets[:, None] ** 2 + offsets**2 <= height**2


def side_for_area(area: float, image_size: tuple[int, int], shape: Shape = "square") -> int:
    """Return the largest side (or diameter) in pixels whose mask covers at most a share of the image.

    For a square this is int(sqrt(NP * H * W)). NP is the literature's "noise percentage": a share of the pixels, not
    of a norm.

    Args:
        area: share of the image's pixels, in (0, 1].
        image_size: (H, W) in pixels.
        shape: square or disc.

    Raises:
        UsageError: a rectangle, which an area alone does not determine, or an area of less than one pixel.
    """
    if shape == "rectangle":
        raise UsageError("an area alone does not determine a rectangle: give size=[height, width] instead")
    # The tolerance keeps 0.0625 * 32 * 32 and the like, exact on paper, from falling just short.
    pixels = math.floor(area * image_size[0] * image_size[1] + 1e-6)
    side = math.isqrt(pixels if shape == "square" else pixels * 3 // 2)
    while side > 0 and int(shape_mask(shape, side).sum()) > pixels:
        side -= 1
    if side < 1:
        raise UsageError(
            f"area={area} of a {image_size[0]}x{image_size[1]} image is less than one pixel: give a larger area"
        )
    return side


def bounding_box(mask: Tensor) -> tuple[int, int, int, int]:
    """Return (row, column, height, width) of the smallest box around the pixels of a mask (h, w).

    The mask has to cover at least one pixel.
    """
    rows, columns = (mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist())
    return rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
