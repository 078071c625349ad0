"""Predicted classes, with or without a patch, at places that depend on nothing but the seed and the image's index."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qadtr_brevitas.attacks.geometry import corners_outside, fixed_corners
from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.core.seeding import generator
from qadtr_brevitas.data.split import Split


def predict(
    model: Callable[[Tensor], Tensor],
    split: Split,
    *,
    patch: Patch | None = None,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the classes that a model predicts for every image of a split.

    The caller has put the model in eval mode and at a precision.

    Args:
        model: images (N, C, H, W) in [0, 1] -> logits (N, classes).
        split: the images.
        patch: put on every image before the forward pass; `placements` says where.
        seed: seed of the placements.
        batch_size: images in one forward pass.
        device: where the model is.

    Returns:
        (N,) int64 on the CPU.

    Raises:
        UsageError: the patch does not fit the images.
    """
    corners = None if patch is None else placements(patch, len(split), split.image_size, seed=seed)
    patch = patch and patch.to(device)
    predictions: list[Tensor] = []
    # Not inference_mode: Brevitas's quantizers fail on its tensors.
    with torch.no_grad():
        for indices, images, _ in split.batches(batch_size, device=device):
            if patch is not None and corners is not None:
                images = patch.apply(images, corners=corners[indices].to(device))
            predictions.append(model(images).argmax(dim=1).cpu())
    return torch.cat(predictions)


def placements(patch: Patch, images: int, image_size: tuple[int, int], *, seed: int) -> Tensor:
    """Return the upper left corners of a patch on every image.

    A corner depends on the seed, the image's index, the patch's size and the box it keeps out of only: such patches
    meet the same images at the same places, on every model and at every precision, so that differences are differences
    of the patches. The first images have the same places however many there are.

    Returns:
        (images, 2) int64, row and column.

    Raises:
        UsageError: the patch is larger than the images, its fixed place is outside of them, or there is no room for it.
    """
    height, width = patch.size
    # Checks that the patch fits at all where its place is random.
    corner = (0, 0) if patch.place == "random" else patch.place
    fixed = fixed_corners(corner, images, image_size, (height, width))
    if patch.place != "random":
        return fixed
    # Doubles, because a float32 times the room may round up to the room itself, which is outside.
    unit = torch.rand(images, 2, generator=generator(seed, "placement"), dtype=torch.float64)
    if patch.keep_out is not None:
        allowed = corners_outside(patch.keep_out, image_size, (height, width))
        return allowed[(unit[:, 0] * len(allowed)).long()]
    return (unit * torch.tensor([image_size[0] - height + 1, image_size[1] - width + 1])).long()
