"""The texture that a patch search starts from: noise, gray, or a picture that the network recognizes.

A network that was trained on patches is blind to noise, and its gradients there lead nowhere. It recognizes a picture
of the target class; from it the same search finds patches that succeed twenty times as often
(docs/results/resistance.md). So a search that starts from noise says little about such a network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from qadtr_brevitas.attacks.per_image import PatchTask

Init: TypeAlias = Literal["image", "uniform", "gray"]

_PICTURES = 64
"""Pictures that are tried for a universal patch: each costs a forward pass over one batch."""

_PICTURES_PER_IMAGE = 8
"""Pictures that are tried for a patch of a single image."""


def start_texture(
    init: Literal["uniform", "gray"], size: tuple[int, int], *, channels: int, generator: torch.Generator
) -> Tensor:
    """Return a texture (C, h, w) to start from: uniform noise in [0, 1], or mid-gray."""
    if init == "gray":
        return torch.full((channels, *size), 0.5)
    return torch.rand(channels, *size, generator=generator, device=generator.device)


@torch.no_grad()
def best_picture(
    pictures: Tensor, size: tuple[int, int], *, loss: Callable[[Tensor], float], generator: torch.Generator
) -> Tensor:
    """Return the picture with the lowest loss, of some that are drawn and shrunk to the size of a patch.

    Args:
        pictures: (N, C, H, W) in [0, 1], not empty.
        size: (h, w) of the patch.
        loss: loss of a texture (C, h, w).
        generator: draws the pictures that are tried.

    Returns:
        (C, h, w) in [0, 1].
    """
    drawn = torch.randperm(len(pictures), generator=generator, device=generator.device)[:_PICTURES]
    tried = shrunk(pictures[drawn.to(pictures.device)], size)
    return tried[min(range(len(tried)), key=[loss(picture) for picture in tried].__getitem__)]


def start_patches(init: Init, task: PatchTask, corners: Tensor, *, generator: torch.Generator) -> Tensor:
    """Return a patch (N, C, h, w) to start from for each image of a task.

    Pictures are the other images of the task: of those tried at an image's corner, the one with the lowest loss. So
    with them, and only with them, an image's patch depends on what else is in its batch.

    Args:
        init: noise, gray or pictures.
        task: the images and the goal of the attack.
        corners: (N, 2) where the patches lie.
        generator: draws noise and pictures.
    """
    shape, device = (len(task.images), task.channels, *task.mask.shape), task.images.device
    if init == "gray":
        return torch.full(shape, 0.5, device=device)
    noise = torch.rand(shape, generator=generator, device=generator.device).to(device)
    return _with_pictures(task, corners, noise, generator=generator) if init == "image" else noise


@torch.no_grad()
def _with_pictures(task: PatchTask, corners: Tensor, patches: Tensor, *, generator: torch.Generator) -> Tensor:
    """Return the patches given, replaced by pictures where those have a lower loss."""
    labels, targets = task.goal.labels, task.goal.targets
    pictures = shrunk(task.images, (patches.shape[-2], patches.shape[-1]))
    lowest = task.assess(patches, corners).losses
    for _ in range(_PICTURES_PER_IMAGE):
        drawn = torch.randperm(len(labels), generator=generator, device=generator.device).to(labels.device)
        losses = task.assess(pictures[drawn], corners).losses
        # A picture of the image's own class would not mislead the network.
        fits = labels[drawn] != labels if targets is None else labels[drawn] == targets
        better = fits & (losses < lowest)
        patches = torch.where(better[:, None, None, None], pictures[drawn], patches)
        lowest = torch.where(better, losses, lowest)
    return patches


def shrunk(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """Return pictures (N, C, H, W) in [0, 1] shrunk to the size of a patch, (N, C, h, w)."""
    return interpolate(pictures, size=size, mode="bilinear", antialias=True).clamp(0, 1)
