"""Patches of their own for every image: the task, its search by gradient, and the base class of such attacks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import ImageAttack, Model
from qadtr_brevitas.attacks.descent import StepRule, Variable, descend
from qadtr_brevitas.attacks.fake_quantize import PATCH_FILE_BITS, fake_quantize
from qadtr_brevitas.attacks.geometry import paste
from qadtr_brevitas.attacks.losses import AttackLoss
from qadtr_brevitas.attacks.patch_settings import PatchSettings
from qadtr_brevitas.attacks.results import AttackGoal, AttackResult, best_per_image
from qadtr_brevitas.core.plugin import plugin
from qadtr_brevitas.core.precision import Precision

AssessPatches: TypeAlias = Callable[[Tensor, Tensor], AttackResult]
"""Patches (N, C, h, w) and corners (N, 2) to the result with them; differentiable in the patches."""

Relocate: TypeAlias = Callable[[AssessPatches, Tensor, Tensor, AttackResult], tuple[Tensor, AttackResult]]
"""(assess, patches, corners, result there) -> corners to go on from, and the result with the patches there."""


@dataclass(frozen=True, kw_only=True)
class PatchTask:
    """Images, each of which is to get a patch of its own.

    Args:
        model: the model under attack.
        images: (N, C, H, W) in [0, 1].
        mask: boolean (h, w), the pixels that each patch covers; on the images' device.
        goal: what the model is to predict.
    """

    model: Model
    images: Tensor
    mask: Tensor
    goal: AttackGoal

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.images.shape[-2], self.images.shape[-1]

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of the patches."""
        return self.mask.shape[0], self.mask.shape[1]

    @property
    def channels(self) -> int:
        """Channels of images and patches."""
        return self.images.shape[1]

    def assess(self, patches: Tensor, corners: Tensor) -> AttackResult:
        """Paste patches (N, C, h, w), rounded to 8 bit, at corners (N, 2), and return the result.

        Differentiable in the patches.
        """
        return self.judge(paste(self.images, fake_quantize(patches, PATCH_FILE_BITS), self.mask, corners))

    def judge(self, images: Tensor) -> AttackResult:
        """Return the result of finished images (N, C, H, W), in which it is differentiable."""
        return self.goal.assess(images, self.model(images))

    def with_loss(self, loss: AttackLoss) -> PatchTask:
        """Return the same task with another loss."""
        return replace(self, goal=replace(self.goal, loss=loss))

    def subset(self, index: Tensor) -> PatchTask:
        """Return the task for some of the images."""
        return PatchTask(model=self.model, images=self.images[index], mask=self.mask, goal=self.goal.subset(index))


def search_patches(
    assess: AssessPatches,
    patches: Tensor,
    corners: Tensor,
    *,
    rule: StepRule,
    steps: int,
    relocate: Relocate | None = None,
) -> AttackResult:
    """Descend every image's loss in its own patch, and return the best result for every image.

    A patch consists of its own pixels and not of the image's: when its corner moves, the texture moves with it. The
    patches before each step are assessed, and those after the last step. No image influences another's patch.

    Args:
        assess: how patches do at given places.
        patches: (N, C, h, w) in [0, 1] to start from.
        corners: (N, 2) to start at.
        rule: how patches follow their gradients.
        steps: number of steps.
        relocate: moves corners once a step; None: they stay. It judges a move by the texture before the step, whose
            loss where it lies is known, so that a move is never credited with what the step achieved.
    """
    best: AttackResult | None = None
    latest: AttackResult | None = None

    def losses(patches: Tensor) -> Tensor:
        nonlocal latest
        result = assess(patches, corners)
        latest = result.detach()
        return result.losses

    def keep_best_and_relocate(patches: Tensor) -> None:
        nonlocal best, corners
        assert latest is not None
        best = latest.or_better(best)
        if relocate is not None:
            corners, moved = relocate(assess, patches, corners, latest)
            best = moved.or_better(best)

    (last,) = descend([Variable(patches, rule)], losses, steps=steps, before_step=keep_best_and_relocate)
    with torch.no_grad():
        return assess(last, corners).or_better(best)


@plugin
class PerImagePatch(PatchSettings, ImageAttack):
    """A patch of its own for every image. A subclass defines the goal and how each restart searches for it."""

    @abstractmethod
    def goal(self, labels: Tensor) -> AttackGoal:
        """Return what the model is to predict for images of these true classes (N,)."""

    @abstractmethod
    def results(self, task: PatchTask, generator: torch.Generator) -> Iterable[AttackResult]:
        """Yield independent results for all images, of which the best is kept for every image."""

    def run(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator,
        precision: Precision | None = None,
    ) -> Tensor:
        """Return patched images, each with a patch of its own. The model's parameters receive no gradients.

        Args:
            model: in evaluation mode, at the precision to attack.
            images: (N, C, H, W) in [0, 1].
            labels: (N,), the true classes.
            generator: draws places, starts and whatever else the search draws.
            precision: not used; patches have 8 bit.

        Returns:
            (N, C, H, W) in [0, 1]; pixels outside the masks are those of the images.

        Raises:
            UsageError: the patch does not fit on the images or beside the box, or the model has no class `target`.
        """
        mask = self.mask((images.shape[-2], images.shape[-1])).to(images.device)
        task = PatchTask(model=model, images=images, mask=mask, goal=self.goal(labels))
        return best_per_image(self.results(task, generator)).images

    def draw_corners(self, task: PatchTask, generator: torch.Generator) -> Tensor:
        """Return a place (N, 2) for each image's patch by these settings, on the images' device."""
        corners = self.corners(len(task.images), task.image_size, task.patch_size, generator=generator)
        return corners.to(task.images.device)
