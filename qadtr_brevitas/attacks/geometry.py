"""Where patches lie and how they are drawn into images: places, pasting, blending. Vectorized over images.

A patch has a texture (C, h, w), a mask (h, w) of the pixels it covers, and a corner per image: row and column
of its top left pixel. Every function takes all images of a batch at once.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from qadtr_brevitas.core.errors import UsageError

Place: TypeAlias = Literal["random"] | tuple[int, int]
Box: TypeAlias = tuple[int, int, int, int]


def random_corners(
    count: int,
    image_size: tuple[int, int],
    patch_size: tuple[int, int],
    *,
    generator: torch.Generator,
    keep_out: Box | None = None,
) -> Tensor:
    """Draw a place for each image, uniformly from all where the patch fits, the last row and column included.

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
    device = generator.device
    if keep_out is not None:
        allowed = corners_outside(keep_out, image_size, patch_size).to(device)
        return allowed[torch.randint(len(allowed), (count,), generator=generator, device=device)]
    rows, columns = _corner_ranges(image_size, patch_size)
    return torch.stack(
        [
            torch.randint(rows, (count,), generator=generator, device=device),
            torch.randint(columns, (count,), generator=generator, device=device),
        ],
        dim=1,
    )


def corners_outside(keep_out: Box, image_size: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """Return every corner (K, 2) whose patch lies on the image and does not touch the box, row by row.

    Raises:
        UsageError: there is no such corner.
    """
    rows, columns = torch.meshgrid(*map(torch.arange, _corner_ranges(image_size, patch_size)), indexing="ij")
    row, column, height, width = keep_out
    beside = (rows + patch_size[0] <= row) | (rows >= row + height)
    beside |= (columns + patch_size[1] <= column) | (columns >= column + width)
    if not bool(beside.any()):
        raise UsageError(
            f"no room for a {patch_size[0]}x{patch_size[1]} patch outside the box {keep_out}: "
            "give a smaller patch or leave a smaller box free"
        )
    return beside.nonzero()


def fixed_corners(
    corner: tuple[int, int], count: int, image_size: tuple[int, int], patch_size: tuple[int, int]
) -> Tensor:
    """Return the same corner (row, column) for every image, as (count, 2).

    Raises:
        UsageError: the patch does not fit there.
    """
    rows, columns = _corner_ranges(image_size, patch_size)
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
    keep_out: Box | None = None,
) -> Tensor:
    """Return corners (count, 2) by a placement rule: drawn for each image if `random`, else the same for all.

    The box to keep out of concerns random places only.

    Raises:
        UsageError: the patch does not fit, or the rule is `random` and there is no generator.
    """
    if place != "random":
        return fixed_corners(place, count, image_size, patch_size)
    if generator is None:
        raise UsageError("the place of this patch is random: give a generator, or the corners themselves")
    return random_corners(count, image_size, patch_size, generator=generator, keep_out=keep_out)


def windows_about(middles: Tensor, image_size: tuple[int, int], window: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return windows of one size about points of the images, moved inside where they hang over the border.

    Args:
        middles: (N, 2) row and column in pixels from the image's corner, fractions allowed.
        image_size: (H, W) in pixels.
        window: (h, w) in pixels, at most the image's.

    Returns:
        Corners (N, 2), int64, and how many pixels (N, 2) each point lies below and to the right of its window's middle.
    """
    half = middles.new_tensor(window) / 2
    corners = torch.minimum((middles - half).round().clamp(min=0), middles.new_tensor(image_size) - 2 * half)
    return corners.long(), middles - half - corners


def paste(images: Tensor, texture: Tensor, mask: Tensor, corners: Tensor) -> Tensor:
    """Paste a texture into images: `x * (1 - M) + p * M`, without touching a pixel outside the mask.

    Differentiable in the texture (a shared one gets the sum over images) and in the images. Costs a copy of the
    images; the backward pass reads the patch's window only.

    Args:
        images: (N, C, H, W).
        texture: (C, h, w), or one per image (N, C, h, w).
        mask: boolean (h, w), or one per image (N, h, w).
        corners: (N, 2) row and column of the top left pixel, integers.

    Returns:
        New images (N, C, H, W); pixels outside the mask are the same floats.

    Raises:
        UsageError: the patch is larger than the image, or a corner puts part of it outside.
    """
    _check_corners(images, _spatial_size(texture), corners)
    flat = images.flatten(2)
    index = _window_index(images, _spatial_size(texture), corners)
    window = flat.gather(2, index)
    patched = torch.where(mask.flatten(-2).unsqueeze(-2).to(images.device), texture.flatten(-2), window)
    return flat.scatter(2, index, patched).view_as(images)


def blend(images: Tensor, texture: Tensor, cover: Tensor, corners: Tensor) -> Tensor:
    """Blend a texture into images under a soft mask: `x * (1 - M) + p * M`, differentiable in texture and mask.

    Args:
        images: (N, C, H, W).
        texture: (C, h, w).
        cover: M (h, w) in [0, 1].
        corners: (N, 2) row and column of the top left pixel, integers; a window may hang over the border by half its
            size, and is cut there.

    Returns:
        New images (N, C, H, W); pixels under a zero of the mask are the same floats.

    Raises:
        UsageError: a corner puts more than half of the window outside.
    """
    (height, width), (down, right) = _spatial_size(images), (side // 2 for side in _spatial_size(texture))
    padded = F.pad(images, (right, right, down, down))
    inner = corners + corners.new_tensor([down, right])
    _check_corners(padded, _spatial_size(texture), inner)
    flat = padded.flatten(2)
    index = _window_index(padded, _spatial_size(texture), inner)
    window = flat.gather(2, index)
    blended = window + cover.flatten() * (texture.flatten(1) - window)
    return flat.scatter(2, index, blended).view_as(padded)[..., down : down + height, right : right + width]


def crop(images: Tensor, size: tuple[int, int], corners: Tensor) -> Tensor:
    """Return the windows (N, C, h, w) of `images` (N, C, H, W) at corners (N, 2): what `paste` would replace."""
    return images.flatten(2).gather(2, _window_index(images, size, corners)).unflatten(2, size)


def _spatial_size(images: Tensor) -> tuple[int, int]:
    """Return height and width, the last two dimensions."""
    return images.shape[-2], images.shape[-1]


def _corner_ranges(image_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """Return the numbers of rows and of columns a corner can be in."""
    rows, columns = image_size[0] - patch_size[0] + 1, image_size[1] - patch_size[1] + 1
    if rows < 1 or columns < 1:
        raise UsageError(
            f"a {patch_size[0]}x{patch_size[1]} patch is larger than the {image_size[0]}x{image_size[1]} image: "
            "give a smaller size or area"
        )
    return rows, columns


def _check_corners(images: Tensor, size: tuple[int, int], corners: Tensor) -> None:
    """Raise if a corner lies outside the image.

    No other code would notice: the pixels would wrap into the next row or image.
    """
    rows, columns = _corner_ranges(_spatial_size(images), size)
    if corners.shape != (len(images), 2):
        raise UsageError(
            f"corners of shape {tuple(corners.shape)} for {len(images)} images: give one (row, column) each"
        )
    if bool((corners < 0).any()) or bool((corners >= corners.new_tensor([rows, columns])).any()):
        raise UsageError(
            f"a corner puts the patch outside the image: give rows 0..{rows - 1}, columns 0..{columns - 1}"
        )


def _window_index(images: Tensor, size: tuple[int, int], corners: Tensor) -> Tensor:
    """Return the flat pixel numbers (N, C, h * w) of each image's window."""
    width = images.shape[-1]
    offsets = torch.arange(size[0])[:, None] * width + torch.arange(size[1])
    starts = corners[:, 0] * width + corners[:, 1]
    index = starts[:, None].to(images.device) + offsets.flatten().to(images.device)
    return index[:, None, :].expand(-1, images.shape[1], -1)
