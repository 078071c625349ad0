"""Universal patches that training keeps from step to step, and that become strong a few gradient steps at a time.

A patch of an image's own gets a handful of steps, and a network learns to ignore what these make of it. What breaks
such a network is a patch that was made for hundreds of steps on many images, and that costs too much to do anew in
each training step. So these go on where the last step left them (after Shafahi et al. 2020, "Universal Adversarial
Training", for perturbations of whole images). Each process of a training keeps its own and improves them on its part of
the batch: with more processes they stay as strong where the batch grows with them.

Images as a quantized network sees them, and how patches get on them: QADT-R, eq. 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qadtr_brevitas.attacks.base import Memory, Model
from qadtr_brevitas.attacks.fake_quantize import fake_quantize
from qadtr_brevitas.attacks.geometry import paste, random_corners
from qadtr_brevitas.attacks.starts import shrunk

_PATCHES = 40
"""Patches kept. Each begins as a picture of the batch, and aims at the picture's class."""

_IMAGES_EACH = 16
"""Images that share a patch in a training step: a gradient of one image points to what fools that image only."""

_RENEWED = 0.05
"""Chance of a patch to begin anew when its turn comes, so that one gets 20 turns on average."""

_STEP = 0.04
"""Root mean square of the change of a patch's pixels in one step."""

_LARGEST = 2.0
"""Bound of a pixel's change, in such steps."""


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
    """Patched images, under some of the patches kept, which are improved first.

    Patches follow the cross-entropy to their class, averaged over images and places; steps are as long whatever the
    gradient's size, but not sign steps, which make noise of a picture.

    Args:
        batch: the images, and how patches get on them.
        model: what is attacked.
        labels: (N,).
        memory: `textures` (K, 3, side, side) in [0, 1] and `targets` (K,), -1 where a patch has not begun; made where
            there are none, and changed.
        side: of the patches as they are kept, in pixels; on the canvas they have its mask's.
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
    _begin(memory, turns, batch.images, labels, generator=generator)
    share = torch.arange(count, device=device) % len(turns)
    textures, targets = memory["textures"][turns], memory["targets"][turns][share]
    misled = targets != labels

    def patched(textures: Tensor) -> Tensor:
        return batch.put(shrunk(textures, batch.size)[share], batch.corners(generator))

    for _ in range(steps):
        textures.requires_grad_()
        losses = cross_entropy(model(patched(textures)), targets, reduction="none")
        (gradient,) = torch.autograd.grad((losses * misled).sum(), textures)
        length = gradient.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=torch.finfo(gradient.dtype).tiny)
        change = (gradient / length).clamp(-_LARGEST, _LARGEST)
        textures = (textures.detach() - _STEP * change).clamp_(0, 1)
    memory["textures"][turns] = textures
    with torch.no_grad():
        return patched(textures)


def _begin(memory: Memory, turns: Tensor, pictures: Tensor, labels: Tensor, *, generator: torch.Generator) -> None:
    """Of the patches whose numbers are `turns`, replaces those not begun yet, and a few others, by pictures."""
    textures, targets = memory["textures"], memory["targets"]
    draws = torch.rand(2, len(turns), generator=generator, device=generator.device).to(labels.device)
    anew = (targets[turns] < 0) | (draws[0] < _RENEWED)
    drawn = (draws[1] * len(labels)).long()[anew]
    textures[turns[anew]] = shrunk(pictures[drawn], (textures.shape[-2], textures.shape[-1]))
    targets[turns[anew]] = labels[drawn]


@dataclass(frozen=True, kw_only=True)
class PatchedBatch:
    """Images of a batch, and what is the same for all patches on them.

    Args:
        images: (N, 3, H, W) in [0, 1].
        background: the same images as they are under the patches, quantized or not.
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
    def size(self) -> tuple[int, int]:
        """Height and width of the patches."""
        return self.mask.shape[0], self.mask.shape[1]

    def corners(self, generator: torch.Generator) -> Tensor:
        """A random place (N, 2), row and column in pixels, for each image's patch.

        Raises:
            UsageError: the patches are larger than the images.
        """
        image_size = self.images.shape[-2], self.images.shape[-1]
        return random_corners(len(self.images), image_size, self.size, generator=generator)

    def put(self, patches: Tensor, corners: Tensor) -> Tensor:
        """Images (N, 3, H, W) with the patches (N, 3, h, w), quantized, at corners (N, 2)."""
        return paste(self.background, fake_quantize(patches, self.bits, step_error=self.step_error), self.mask, corners)
