"""A pool of universal patches that training keeps from step to step and improves a few gradient steps at a time.

A patch of an image's own gets a handful of steps, and a network learns to ignore what these make of it. What breaks
such a network is a patch that was optimized for hundreds of steps on many images, which costs too much to repeat in
each training step. So the patches of the pool continue where the last training step left them (after Shafahi et al.
2020, "Universal Adversarial Training", for perturbations of whole images). Each training process keeps a pool of its
own and improves it on its part of the batch: with more processes the patches stay as strong if the batch grows too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qadtr_brevitas.attacks.base import Memory, Model
from qadtr_brevitas.attacks.descent import ApplyStep, StepRule, Variable, descend
from qadtr_brevitas.attacks.fake_quantize import fake_quantize
from qadtr_brevitas.attacks.geometry import paste, random_corners
from qadtr_brevitas.attacks.starts import shrunk

_PATCHES = 40
"""Patches in the pool. Each starts as a picture of the batch, and aims at the picture's class."""

_IMAGES_EACH = 16
"""Images that share a patch in a training step: the gradient of one image finds what fools that image only."""

_RENEWED = 0.05
"""Probability that a patch is replaced when its turn comes, so that it gets 20 turns on average."""

_STEP = 0.04
"""Root mean square of the change of a patch's pixels in one step."""

_LARGEST = 2.0
"""Bound of a pixel's change, in such steps."""


@dataclass(frozen=True)
class NormalizedSteps(StepRule):
    """Gradient steps of the same length for every patch, whatever the size of its gradient.

    Not sign steps, which make noise of a picture.
    """

    def bind(self, values: Tensor) -> ApplyStep:
        def apply(gradient: Tensor, step: int) -> None:
            length = gradient.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=torch.finfo(gradient.dtype).tiny)
            values.sub_(_STEP * (gradient / length).clamp(-_LARGEST, _LARGEST))

        return apply


def pool_patches(
    batch: PatchedBatch,
    model: Model,
    labels: Tensor,
    memory: Memory,
    *,
    side: int,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """Return the images under some patches of the pool, which are improved first.

    Patches descend the cross-entropy to their class, averaged over images and places.

    Args:
        batch: the images, and how patches are drawn into them.
        model: the model under attack.
        labels: (N,), the true classes.
        memory: the pool: `textures` (K, 3, side, side) in [0, 1] and `targets` (K,), -1 where a patch has not started.
            Filled if it is empty, and changed in place.
        side: side of the patches in the pool, in pixels; in the images they have the size of the batch's mask.
        steps: gradient steps.
        generator: draws patches and places.

    Returns:
        (N, 3, H, W) in [0, 1].

    Raises:
        UsageError: the patches are larger than the images.
    """
    device = labels.device
    if not memory:
        memory["textures"] = torch.zeros(_PATCHES, 3, side, side, device=device)
        memory["targets"] = torch.full((_PATCHES,), -1, device=device)
    count = len(labels)
    turns = torch.randperm(_PATCHES, generator=generator, device=generator.device).to(device)
    turns = turns[: min(_PATCHES, max(1, count // _IMAGES_EACH))]
    _start_new_patches(memory, turns, batch.images, labels, generator=generator)
    patch_of_image = torch.arange(count, device=device) % len(turns)
    targets = memory["targets"][turns][patch_of_image]
    # An image of the target class itself tells nothing.
    counts = targets != labels

    def patched(textures: Tensor) -> Tensor:
        patches = shrunk(textures, batch.patch_size)[patch_of_image]
        return batch.with_patches(patches, batch.draw_corners(generator))

    def losses(textures: Tensor) -> Tensor:
        return cross_entropy(model(patched(textures)), targets, reduction="none") * counts

    (textures,) = descend([Variable(memory["textures"][turns], NormalizedSteps())], losses, steps=steps)
    memory["textures"][turns] = textures
    with torch.no_grad():
        return patched(textures)


def _start_new_patches(
    memory: Memory, turns: Tensor, pictures: Tensor, labels: Tensor, *, generator: torch.Generator
) -> None:
    """Replace those patches among `turns` (their numbers) that have not started, and a few others, by pictures."""
    textures, targets = memory["textures"], memory["targets"]
    draws = torch.rand(2, len(turns), generator=generator, device=generator.device).to(labels.device)
    replaced = (targets[turns] < 0) | (draws[0] < _RENEWED)
    drawn = (draws[1] * len(labels)).long()[replaced]
    textures[turns[replaced]] = shrunk(pictures[drawn], (textures.shape[-2], textures.shape[-1]))
    targets[turns[replaced]] = labels[drawn]


@dataclass(frozen=True, kw_only=True)
class PatchedBatch:
    """Images as a quantized network sees them, and what all patches on them have in common (QADT-R, eq. 1).

    Args:
        images: (N, 3, H, W) in [0, 1].
        background: the same images as they are around the patches, quantized or not.
        mask: boolean (h, w) of the pixels a patch covers.
        bits: bit-width of the patches.
        step_error: relative error of their quantizer's step.
    """

    images: Tensor
    background: Tensor
    mask: Tensor
    bits: int
    step_error: float

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of the patches."""
        return self.mask.shape[0], self.mask.shape[1]

    def draw_corners(self, generator: torch.Generator) -> Tensor:
        """Draw a place (N, 2), row and column in pixels, for each image's patch.

        Raises:
            UsageError: the patches are larger than the images.
        """
        image_size = self.images.shape[-2], self.images.shape[-1]
        return random_corners(len(self.images), image_size, self.patch_size, generator=generator)

    def with_patches(self, patches: Tensor, corners: Tensor) -> Tensor:
        """Return images (N, 3, H, W) with the patches (N, 3, h, w), quantized, at corners (N, 2)."""
        quantized = fake_quantize(patches, self.bits, step_error=self.step_error)
        return paste(self.background, quantized, self.mask, corners)
