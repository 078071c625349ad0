"""Patches of one's own: a picture of a sticker, whose transparency is its shape, or a file of published patches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import interpolate

from qadtr_brevitas.attacks.fake_quantize import PATCH_FILE_BITS, fake_quantize
from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.attacks.shapes import bounding_box
from qadtr_brevitas.core.errors import CheckpointError
from qadtr_brevitas.core.patch_size import PatchSize, PatchSizeLike

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_OPAQUE = 0.5
"""Share of a pixel above which it belongs to a patch."""


def read_picture(path: str | Path) -> Patch:
    """Read a picture as a patch: what is transparent does not belong to it, and is cut off around it.

    A picture without transparency is a rectangle. A PNG without it whose border has a single color is refused: its
    background would be pasted with it.

    Args:
        path: PNG, JPEG, WebP or BMP.

    Returns:
        A patch of three channels at random places, of the picture's size in pixels.

    Raises:
        CheckpointError: the file cannot be read, is wholly transparent, or is a PNG with a background.
    """
    source = Path(path)
    try:
        with Image.open(source) as file:
            transparent = "A" in file.getbands() or "transparency" in file.info
            kind, pixels = file.format, numpy.asarray(file.convert("RGBA"))
    except FileNotFoundError:
        raise CheckpointError(f"there is no picture {source}: check the path") from None
    # Decoders raise whatever the libraries below them do.
    except Exception as error:
        raise CheckpointError(f"cannot read the picture {source} ({error}): save it again as PNG") from error
    colors = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
    if kind == "PNG" and not transparent and _has_background(colors[:3]):
        raise CheckpointError(
            f"{source} has no transparency and a border of one color, which would be pasted with it: make the "
            "background transparent (an alpha channel), or save the picture as JPEG if the whole rectangle is meant"
        )
    mask = colors[3] >= _OPAQUE
    if not bool(mask.any()):
        raise CheckpointError(f"{source} is transparent everywhere: nothing of it would be pasted")
    row, column, height, width = bounding_box(mask)
    box = slice(row, row + height), slice(column, column + width)
    return _patch(colors[:3, *box], mask[box], attack=source.stem, target=None)


def read_tensors(path: str | Path) -> list[Patch]:
    """Read the patches of a `.safetensors` file of another project, such as ImageNet-Patch (Pintor et al. 2022).

    Args:
        path: file with `patches` (K, C, h, w) in [0, 1] or uint8 and, optionally, `masks` (K, h, w), where they cover
            the image, and `targets` (K,), the classes they aim at.

    Returns:
        K patches at random places.

    Raises:
        CheckpointError: the file cannot be read, or does not hold such tensors.
    """
    source = Path(path)
    try:
        tensors = load_file(source)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{source} is not a whole safetensors file ({error}): fetch it again") from error
    patches, masks, targets = (tensors.get(name) for name in ("patches", "masks", "targets"))
    if patches is None or patches.ndim != 4 or 0 in patches.shape:
        first = list(tensors.items())[:3]
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in first) or "no tensors"
        raise CheckpointError(
            f"{source} holds {shapes}: give patches (K, channels, h, w) in [0, 1], and perhaps masks (K, h, w) and "
            "targets (K,), or a file that `qadtr-brevitas attack` wrote"
        )
    values = patches.float() / 255 if patches.dtype == torch.uint8 else patches.float()
    covered = torch.ones(len(patches), *patches.shape[2:]) if masks is None else masks
    aims = [None] * len(patches) if targets is None else [int(target) for target in targets.flatten()]
    if not (bool((values >= 0).all()) and bool((values <= 1).all())):
        raise CheckpointError(
            f"the patches of {source} are not in [0, 1]: divide them by 255, or undo the normalization"
        )
    if covered.shape != (len(patches), *patches.shape[2:]) or len(aims) != len(patches):
        raise CheckpointError(f"{source} has not one mask and one target for each of its {len(patches)} patches")
    return [
        _patch(texture, mask >= _OPAQUE, attack=source.stem, target=target)
        for texture, mask, target in zip(values, covered, aims, strict=True)
    ]


def scaled(patch: Patch, size: PatchSizeLike) -> Patch:
    """Return a patch of one's own that fills a box as far as its proportions allow.

    Args:
        patch: the patch.
        size: height and width of the box in pixels.
    """
    box = PatchSize.parse(size)
    (height, width), covered = patch.size, patch.mask.float()
    factor = min(box.height / height, box.width / width)
    new_size = max(1, round(height * factor)), max(1, round(width * factor))
    # Weighted by the mask, so that nothing from outside it bleeds in.
    both = torch.cat([patch.texture * covered, covered[None]])[None]
    drawn = interpolate(both, size=new_size, mode="bilinear", antialias=True)[0]
    mask = drawn[-1] >= _OPAQUE
    if not bool(mask.any()):
        mask = drawn[-1] == drawn[-1].max()
    texture = drawn[:-1] / drawn[-1].clamp(min=torch.finfo(drawn.dtype).tiny)
    return replace(patch, texture=fake_quantize(texture.clamp(0, 1), PATCH_FILE_BITS), mask=mask)


def _patch(texture: Tensor, mask: Tensor, *, attack: str, target: int | None) -> Patch:
    meta = {"attack": attack, "target": target, "own": True}
    return Patch(texture=fake_quantize(texture, PATCH_FILE_BITS), mask=mask, meta=meta)


def _has_background(colors: Tensor) -> bool:
    """Return whether the border of a picture (3, h, w) has a single color and something else is inside."""
    border = torch.cat([colors[:, 0], colors[:, -1], colors[:, :, 0], colors[:, :, -1]], dim=1)
    color = border[:, :1]
    return bool((border == color).all()) and not bool((colors == color[:, :, None]).all())
