"""Where the search of a patch begins: noise, gray, or a picture that the network already takes for something.

A network that was trained on patches is blind to noise, and from there its gradients lead nowhere. A picture of the
target class is seen; from it the same search finds patches that succeed twenty times as often (docs/results.md). So a
search that begins at noise says little about such a network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from qadtr_brevitas.attacks.per_image import PatchProblem

Init: TypeAlias = Literal["image", "uniform", "gray"]

_PICTURES = 64
"""Pictures that are tried for a universal patch: each costs a forward pass over one batch."""

_PICTURES_EACH = 8
"""Pictures that are tried for a patch of a single image."""


def start_texture(init: Literal["uniform", "gray"], size: tuple[int, int], *, generator: torch.Generator) -> Tensor:
    """Texture (3, h, w) to start from: uniform noise in [0, 1], or mid-gray."""
    if init == "gray":
        return torch.full((3, *size), 0.5)
    return torch.rand(3, *size, generator=generator, device=generator.device)


@torch.no_grad()
def best_picture(
    pictures: Tensor, size: tuple[int, int], *, loss: Callable[[Tensor], float], generator: torch.Generator
) -> Tensor:
    """Of some pictures, made as small as a patch, the one with the lowest loss.

    Args:
        pictures: (N, 3, H, W) in [0, 1], not empty.
        size: (h, w) of the patch.
        loss: of a texture (3, h, w).
        generator: draws the pictures that are tried.

    Returns:
        (3, h, w) in [0, 1].
    """
    drawn = torch.randperm(len(pictures), generator=generator, device=generator.device)[:_PICTURES]
    tried = shrunk(pictures[drawn.to(pictures.device)], size)
    return tried[min(range(len(tried)), key=[loss(picture) for picture in tried].__getitem__)]


def start_patches(init: Init, problem: PatchProblem, corners: Tensor, *, generator: torch.Generator) -> Tensor:
    """A patch (N, 3, h, w) to start from for each image of a scene.

    Pictures are the other images of the scene: of those tried at an image's corner, the one with the lowest loss. So
    with them, and only with them, an image's patch depends on what else is in its batch.

    Args:
        init: noise, gray or pictures.
        problem: the images, and what is wanted of them.
        corners: (N, 2) where the patches lie.
        generator: draws.
    """
    shape, device = (len(problem.images), 3, *problem.mask.shape), problem.images.device
    if init == "gray":
        return torch.full(shape, 0.5, device=device)
    noise = torch.rand(shape, generator=generator, device=generator.device).to(device)
    return _pictures(problem, corners, noise, generator=generator) if init == "image" else noise


@torch.no_grad()
def _pictures(problem: PatchProblem, corners: Tensor, patches: Tensor, *, generator: torch.Generator) -> Tensor:
    """The patches given, replaced by pictures of lower loss."""
    labels, targets = problem.aim.labels, problem.aim.targets
    pictures = shrunk(problem.images, (patches.shape[-2], patches.shape[-1]))
    lowest = problem.attempt(patches, corners).losses
    for _ in range(_PICTURES_EACH):
        drawn = torch.randperm(len(labels), generator=generator, device=generator.device).to(labels.device)
        losses = problem.attempt(pictures[drawn], corners).losses
        # A picture of its own class would not mislead anybody.
        fits = labels[drawn] != labels if targets is None else labels[drawn] == targets
        better = fits & (losses < lowest)
        patches = torch.where(better[:, None, None, None], pictures[drawn], patches)
        lowest = torch.where(better, losses, lowest)
    return patches


def shrunk(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1], as small as a patch, (N, 3, h, w)."""
    return interpolate(pictures, size=size, mode="bilinear", antialias=True).clamp(0, 1)
