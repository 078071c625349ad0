"""Where a patch is and what it covers: masks, budgets, places, pasting. Vectorised over images.

A patch has a texture (3, h, w), a mask (h, w) of the pixels it covers, and a corner per image: row and column
of its top left pixel. Every function takes all images of a batch at once.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from qadtr_brevitas.errors import UsageError

Shape: TypeAlias = Literal["square", "rectangle", "disc"]
Place: TypeAlias = Literal["random"] | tuple[int, int]
Box: TypeAlias = tuple[int, int, int, int]


def shape_mask(shape: Shape, size: int | tuple[int, int]) -> Tensor:
    """The pixels a shape covers.

    Args:
        shape: `square` and `disc` take one side or diameter in pixels; `rectangle` takes (height, width).
            A disc covers the pixels whose center lies in the circle.
        size: in pixels.

    Returns:
        Boolean mask (h, w).

    Raises:
        UsageError: a size that does not go with the shape or is not positive.
    """
    if isinstance(size, int) == (shape == "rectangle"):
        raise UsageError(f"size {size} does not fit shape {shape}: give a {_SIZE_RULE[shape]}")
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise UsageError(f"patch size {size} is not possible: give at least 1 pixel a side")
    if shape != "disc":
        return torch.ones(height, width, dtype=torch.bool)
    # Twice the distances, so that everything stays an exact integer.
    offsets = 2 * torch.arange(height) - (height - 1)
    return offsets[:, None] ** 2 + offsets**2 <= height**2


_SIZE_RULE = {
    "square": "single number, its side in pixels, such as size=8",
    "disc": "single number, its diameter in pixels, such as size=8",
    "rectangle": "height and a width in pixels, such as size=[6, 10]",
}


def side_for_share(share: float, image_size: tuple[int, int], shape: Shape = "square") -> int:
    """The largest side (or diameter) in pixels whose mask covers at most a share of the image.

    For a square this is int(sqrt(NP * H * W)), what the literature's "noise percentage" NP means: a share of the
    pixels, not of a norm.

    Raises:
        UsageError: a rectangle, which a share alone does not determine, or a share too small for one pixel.
    """
    if shape == "rectangle":
        raise UsageError("a share of the pixels does not determine a rectangle: give size=[height, width] instead")
    # The tolerance keeps 0.0625 * 32 * 32 and the like, exact on paper, from falling just short.
    pixels = math.floor(share * image_size[0] * image_size[1] + 1e-6)
    side = math.isqrt(pixels if shape == "square" else pixels * 3 // 2)
    while side > 0 and int(shape_mask(shape, side).sum()) > pixels:
        side -= 1
    if side < 1:
        raise UsageError(f"np={share} of a {image_size[0]}x{image_size[1]} image is less than one pixel: give more")
    return side


def random_corners(
    count: int,
    image_size: tuple[int, int],
    patch_size: tuple[int, int],
    *,
    generator: torch.Generator,
    keep_out: Box | None = None,
) -> Tensor:
    """Uniform over every place where the patch fits, the last row and column included; one place per image.

    Args:
        count: number of images.
        image_size: (H, W) in pixels.
        patch_size: (h, w) in pixels.
        generator: rows and columns are separate draws from it.
        keep_out: (row, column, height, width) of a box that no patch may touch, for instance the main object's.

    Returns:
        Corners (count, 2), int64, on the generator's device.

    Raises:
        UsageError: the patch is larger than the image, or does not fit beside the box.
    """
    rows, columns = _places(image_size, patch_size)
    if keep_out is not None:
        return _corners_outside(keep_out, count, (rows, columns), patch_size, generator)
    device = generator.device
    return torch.stack(
        [
            torch.randint(rows, (count,), generator=generator, device=device),
            torch.randint(columns, (count,), generator=generator, device=device),
        ],
        dim=1,
    )


def fixed_corners(
    corner: tuple[int, int], count: int, image_size: tuple[int, int], patch_size: tuple[int, int]
) -> Tensor:
    """The same corner (row, column) for every image, as (count, 2).

    Raises:
        UsageError: the patch does not fit there.
    """
    rows, columns = _places(image_size, patch_size)
    if not (0 <= corner[0] < rows and 0 <= corner[1] < columns):
        raise UsageError(
            f"a {patch_size[0]}x{patch_size[1]} patch does not fit at row {corner[0]}, column {corner[1]} of a "
            f"{image_size[0]}x{image_size[1]} image: give place=[0..{rows - 1}, 0..{columns - 1}] or place=random"
        )
    return torch.tensor([corner]).expand(count, 2)


def place_corners(
    place: Place,
    count: int,
    image_size: tuple[int, int],
    patch_size: tuple[int, int],
    *,
    generator: torch.Generator | None,
) -> Tensor:
    """Corners (count, 2) by a placement rule: anew per image if `random`, else the same (row, column).

    Raises:
        UsageError: the patch does not fit, or `random` without a generator.
    """
    if place != "random":
        return fixed_corners(place, count, image_size, patch_size)
    if generator is None:
        raise UsageError("this patch goes to random places: give a generator, or the corners themselves")
    return random_corners(count, image_size, patch_size, generator=generator)


def paste(images: Tensor, texture: Tensor, mask: Tensor, corners: Tensor) -> Tensor:
    """Puts a texture on images: `x * (1 - M) + p * M` without touching a pixel outside the mask.

    Differentiable in the texture (a shared one gets the sum over images) and in the images. Costs a copy of the
    images; the backward pass reads the patch's window only.

    Args:
        images: (N, 3, H, W).
        texture: (3, h, w), or one per image (N, 3, h, w).
        mask: boolean (h, w), or one per image (N, h, w).
        corners: (N, 2) row and column of the top left pixel, integers.

    Returns:
        New images (N, 3, H, W); pixels outside the mask are the same floats.

    Raises:
        UsageError: the patch is larger than the image, or a corner puts part of it outside.
    """
    rows, columns = _places(_size(images), _size(texture))
    if corners.shape != (len(images), 2):
        raise UsageError(
            f"corners of shape {tuple(corners.shape)} for {len(images)} images: give one (row, column) each"
        )
    # A corner outside would not raise below: it would wrap into the next row or image.
    if bool((corners < 0).any()) or bool((corners >= corners.new_tensor([rows, columns])).any()):
        raise UsageError(
            f"a corner puts the patch outside the image: give rows 0..{rows - 1}, columns 0..{columns - 1}"
        )
    flat = images.flatten(2)
    index = _window_index(images, _size(texture), corners)
    window = flat.gather(2, index)
    patched = torch.where(mask.flatten(-2).unsqueeze(-2).to(images.device), texture.flatten(-2), window)
    return flat.scatter(2, index, patched).view_as(images)


def crop(images: Tensor, size: tuple[int, int], corners: Tensor) -> Tensor:
    """The windows (N, 3, h, w) of `images` (N, 3, H, W) at corners (N, 2): what `paste` would replace."""
    return images.flatten(2).gather(2, _window_index(images, size, corners)).unflatten(2, size)


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]


def _places(image_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """Number of rows and of columns a corner can be in."""
    rows, columns = image_size[0] - patch_size[0] + 1, image_size[1] - patch_size[1] + 1
    if rows < 1 or columns < 1:
        raise UsageError(
            f"a {patch_size[0]}x{patch_size[1]} patch is larger than the {image_size[0]}x{image_size[1]} image: "
            "give a smaller size or np"
        )
    return rows, columns


def _corners_outside(
    box: Box, count: int, places: tuple[int, int], patch_size: tuple[int, int], generator: torch.Generator
) -> Tensor:
    """Uniform over the corners whose patch does not touch the box."""
    row, column, height, width = box
    rows, columns = torch.meshgrid(torch.arange(places[0]), torch.arange(places[1]), indexing="ij")
    beside = (rows + patch_size[0] <= row) | (rows >= row + height)
    beside |= (columns + patch_size[1] <= column) | (columns >= column + width)
    allowed = beside.nonzero().to(generator.device)
    if len(allowed) == 0:
        raise UsageError(
            f"no room for a {patch_size[0]}x{patch_size[1]} patch outside the box {box}: "
            "give a smaller patch or a smaller keep_out box"
        )
    return allowed[torch.randint(len(allowed), (count,), generator=generator, device=generator.device)]


def _window_index(images: Tensor, size: tuple[int, int], corners: Tensor) -> Tensor:
    """Flat pixel numbers (N, 3, h * w) of each image's window."""
    width = images.shape[-1]
    offsets = torch.arange(size[0])[:, None] * width + torch.arange(size[1])
    starts = corners[:, 0] * width + corners[:, 1]
    index = starts[:, None].to(images.device) + offsets.flatten().to(images.device)
    return index[:, None, :].expand(-1, images.shape[1], -1)
