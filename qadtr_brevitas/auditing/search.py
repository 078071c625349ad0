"""The white-box attack inside the audit: a patch for each image, of which checks vary one thing at a time.

Sign steps with momentum from uniform noise at a fixed place. Short is enough: on a float CIFAR ResNet-20, 8x8 patches
of 15 steps break 89 % of the images, of 30 and of 60 steps 96 %; without momentum twice the steps are needed. Patches
are what an 8-bit image can hold.

What the patches of an audit descend, and the margin that tells which of them are best.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import Model
from qadtr_brevitas.attacks.fake_quantize import PATCH_FILE_BITS, fake_quantize
from qadtr_brevitas.attacks.geometry import paste
from qadtr_brevitas.attacks.losses import attack_loss

Objective: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Logits (N, classes) and classes (N,), the true ones unless said, to numbers (N,) to be made small."""

DLR_CLASSES = 3
"""The classes that the difference of logits ratio needs at least."""

# As AutoAttack adds it, for outputs that are all alike.
_SMALLEST = 1e-12


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Minus the cross-entropy of the true class."""
    return attack_loss("cross-entropy", logits, labels)


def tempered(factor: float) -> Objective:
    """Cross-entropy of logits times a factor, which changes no prediction (Gupta and Ajanthan 2020)."""
    return lambda logits, labels: attack_loss("cross-entropy", factor * logits, labels)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """True logit minus the largest other one, negative where the prediction is wrong."""
    return attack_loss("margin", logits, labels)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (Croce and Hein 2020, eq. 6): the margin by the first minus the third logit."""
    top = logits.topk(DLR_CLASSES, dim=1).values
    return margin(logits, labels) / (top[:, 0] - top[:, DLR_CLASSES - 1]).clamp_min(_SMALLEST)


def towards(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy of classes to be seen instead of the true ones."""
    return attack_loss("cross-entropy", logits, classes, classes)


STEP_SIZE, MOMENTUM = 0.1, 0.75


@dataclass(frozen=True)
class PatchedImages:
    """Images and where their patches go.

    Args:
        images: (N, 3, H, W) in [0, 1].
        labels: (N,).
        corners: (N, 2), row and column of each patch.
        aims: (N,) classes that the objective is given instead of the labels.
    """

    images: Tensor
    labels: Tensor
    corners: Tensor
    aims: Tensor | None = None

    def put(self, patches: Tensor) -> Tensor:
        """The images with patches (N, 3, h, w), rounded to 8 bit; differentiable in the patches."""
        mask = torch.ones(patches.shape[-2:], dtype=torch.bool, device=patches.device)
        return paste(self.images, fake_quantize(patches, PATCH_FILE_BITS), mask, self.corners)

    def only(self, index: Tensor) -> PatchedImages:
        """The same for some of the images."""
        aims = None if self.aims is None else self.aims[index]
        return PatchedImages(self.images[index], self.labels[index], self.corners[index], aims)


@dataclass(frozen=True)
class SearchTrace:
    """What one search went through.

    Args:
        best: after so many steps, the patches (N, 3, h, w) with the smallest margin until then.
        last: the patches after the last step.
        losses: (steps + 1, N), of the patches before each step and after the last one.
        zero: (steps, N), where the gradient in the patch was exactly zero.
        broken: (steps, N), where it was not finite.
    """

    best: dict[int, Tensor]
    last: Tensor
    losses: Tensor
    zero: Tensor
    broken: Tensor


def search(
    model: Model,
    scene: PatchedImages,
    start: Tensor,
    *,
    steps: int,
    objective: Objective = cross_entropy,
    marks: Collection[int] = (),
    step_size: float = STEP_SIZE,
) -> SearchTrace:
    """Searches patches and keeps the best ones by the margin on the model that gives the gradients.

    Args:
        model: where the gradients come from.
        scene: the images.
        start: patches (N, 3, h, w) in [0, 1].
        steps: forward and backward passes, at least 1; one more forward pass judges the last patches.
        objective: what is descended.
        marks: numbers of steps after which to note the best patches; the last one is always noted.
        step_size: of a step, in pixel values.
    """
    patches, velocity = start, torch.zeros_like(start)
    best, smallest = start, start.new_full((len(start),), torch.inf)
    noted: dict[int, Tensor] = {}
    losses: list[Tensor] = []
    zero: list[Tensor] = []
    broken: list[Tensor] = []
    for step in range(steps + 1):
        patches = patches.detach().requires_grad_(step < steps)
        with torch.set_grad_enabled(step < steps):
            logits = model(scene.put(patches))
            loss = objective(logits, scene.labels if scene.aims is None else scene.aims)
        margins = margin(logits.detach(), scene.labels)
        best = torch.where((margins < smallest)[:, None, None, None], patches.detach(), best)
        smallest = torch.where(margins < smallest, margins, smallest)
        losses.append(loss.detach())
        if step in marks or step == steps:
            noted[step] = best
        if step == steps:
            break
        gradient = gradient_of(loss, patches)
        zero.append((gradient == 0).flatten(1).all(1))
        broken.append(~gradient.isfinite().flatten(1).all(1))
        velocity = MOMENTUM * velocity + _normalized(gradient.nan_to_num(0, 0, 0))
        patches = (patches.detach() - step_size * velocity.sign()).clamp(0, 1)
    return SearchTrace(noted, patches.detach(), torch.stack(losses), torch.stack(zero), torch.stack(broken))


def gradient_of(loss: Tensor, patches: Tensor) -> Tensor:
    """Gradient of the sum of `loss` (N,) in patches (N, 3, h, w); zero where the way back is interrupted."""
    if not loss.requires_grad:
        return torch.zeros_like(patches)
    try:
        gradients = torch.autograd.grad(loss.sum(), patches, allow_unused=True, materialize_grads=True)
    except NotImplementedError:
        # What torch raises for an operation without a backward pass. No gradient for an attacker either: G8 warns.
        return torch.zeros_like(patches)
    return gradients[0]


def _normalized(gradient: Tensor) -> Tensor:
    # Or the momentum of a loss that grows as the attack succeeds would forget its first steps.
    size = gradient.abs().mean((1, 2, 3), keepdim=True)
    return gradient / size.clamp_min(torch.finfo(gradient.dtype).tiny)
