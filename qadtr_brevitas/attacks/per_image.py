"""What patch attacks on single images share: the aim, the attempts and which is best, the search by gradient.

Patch attacks on each image by itself, as recipe and command line know them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import TypeAlias

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import ImageAttack, Model
from qadtr_brevitas.attacks.engine import Descent
from qadtr_brevitas.attacks.fake_quantize import PATCH_FILE_BITS, fake_quantize
from qadtr_brevitas.attacks.geometry import paste
from qadtr_brevitas.attacks.losses import AttackLoss, attack_loss, check_target
from qadtr_brevitas.attacks.patch_fields import PatchFields
from qadtr_brevitas.core.plugin import plugin
from qadtr_brevitas.core.precision import Precision


@dataclass(frozen=True)
class Attempt:
    """One try at every image.

    Args:
        images: (N, 3, H, W) in [0, 1], what the network saw.
        losses: (N,), lower is better.
        success: (N,) boolean, whether the network said what the attack wants. For choosing among attempts only.
    """

    images: Tensor
    losses: Tensor
    success: Tensor

    def detach(self) -> Attempt:
        """The same without the graph."""
        return Attempt(self.images.detach(), self.losses.detach(), self.success)

    def beats(self, other: Attempt) -> Tensor:
        """(N,) boolean: a success where the other is none, or a lower loss where both are alike.

        By loss alone a failure could win: cross-entropy to one class may be low while another class is lower still.
        """
        # Anything is better than a loss that is not a number, which compares as false both ways.
        lower = self.losses < other.losses.where(~other.losses.isnan(), torch.inf)
        return torch.where(self.success == other.success, lower, self.success)

    def replaced(self, other: Attempt, where: Tensor) -> Attempt:
        """The other attempt at the images where (N,) is true, this one elsewhere."""
        return Attempt(
            torch.where(where[:, None, None, None], other.images, self.images),
            torch.where(where, other.losses, self.losses),
            torch.where(where, other.success, self.success),
        )

    def better_of(self, other: Attempt | None) -> Attempt:
        """The better of the two for every image; of equals this one."""
        return self if other is None else self.replaced(other, other.beats(self))

    def only(self, index: Tensor) -> Attempt:
        """The attempt at some of the images."""
        return Attempt(self.images[index], self.losses[index], self.success[index])

    def updated(self, index: Tensor, other: Attempt) -> Attempt:
        """With the other attempt at the images it is about, which `index` gives."""
        return Attempt(
            self.images.index_copy(0, index, other.images),
            self.losses.index_copy(0, index, other.losses),
            self.success.index_copy(0, index, other.success),
        )


@dataclass(frozen=True)
class Aim:
    """What an attack wants of every image.

    Args:
        labels: (N,) true classes.
        targets: (N,) classes to be seen instead; None: any wrong one.
        loss: what is descended.
    """

    labels: Tensor
    targets: Tensor | None
    loss: AttackLoss

    @classmethod
    def at(cls, target: int | None, labels: Tensor, *, loss: AttackLoss) -> Aim:
        """The same target class for every image, or None."""
        return cls(labels, None if target is None else torch.full_like(labels, target), loss)

    def attempt(self, images: Tensor, logits: Tensor) -> Attempt:
        """How images do whose logits are (N, classes); differentiable in the logits.

        Raises:
            UsageError: the model has no such target class.
        """
        predictions = logits.argmax(1)
        if self.targets is None:
            success = predictions != self.labels
        else:
            check_target(int(self.targets.max()), classes=logits.shape[1])
            success = predictions == self.targets
        return Attempt(images, attack_loss(self.loss, logits, self.labels, self.targets), success)

    def only(self, index: Tensor) -> Aim:
        """The aim for some of the images."""
        return Aim(self.labels[index], None if self.targets is None else self.targets[index], self.loss)


@dataclass(frozen=True, kw_only=True)
class PatchProblem:
    """Images, each to get a patch of its own.

    Args:
        model: what is attacked.
        images: (N, 3, H, W) in [0, 1].
        mask: boolean (h, w), the same for all patches.
        aim: what is wanted of every image.
    """

    model: Model
    images: Tensor
    mask: Tensor
    aim: Aim

    def attempt(self, patches: Tensor, corners: Tensor) -> Attempt:
        """Pastes patches (N, 3, h, w), rounded to 8 bit, at corners (N, 2); differentiable in the patches."""
        images = paste(self.images, fake_quantize(patches, PATCH_FILE_BITS), self.mask, corners)
        return self.aim.attempt(images, self.model(images))

    def only(self, index: Tensor) -> PatchProblem:
        """Some of the images."""
        return PatchProblem(model=self.model, images=self.images[index], mask=self.mask, aim=self.aim.only(index))


@dataclass(frozen=True, kw_only=True)
class ImageAttackInputs:
    """What an attack on single images is given.

    Args:
        model: what is attacked.
        images: (N, 3, H, W) in [0, 1].
        labels: (N,).
        mask: boolean (h, w), on the images' device.
        generator: for everything that is drawn.
    """

    model: Model
    images: Tensor
    labels: Tensor
    mask: Tensor
    generator: torch.Generator

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.images.shape[-2], self.images.shape[-1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the patches."""
        return self.mask.shape[0], self.mask.shape[1]

    def problem(self, target: int | None, *, loss: AttackLoss) -> PatchProblem:
        """The images with an aim."""
        aim = Aim.at(target, self.labels, loss=loss)
        return PatchProblem(model=self.model, images=self.images, mask=self.mask, aim=aim)


Relocate: TypeAlias = Callable[[PatchProblem, Tensor, Tensor, Attempt], tuple[Tensor, Attempt]]
"""(scene, patches, corners, attempt with them) -> corners to go on from, and the attempt with the patches there."""


def search_patches(
    problem: PatchProblem, patches: Tensor, corners: Tensor, *, descent: Descent, relocate: Relocate | None = None
) -> Attempt:
    """Descends every image's loss in its own patch, and keeps the best attempt at every image.

    A patch is known by its own pixels and not by the image's: when its corner moves, the texture moves with it. Every
    iterate is an attempt, also the one after the last step. No image has an influence on another's patch.

    Args:
        problem: images and aim.
        patches: (N, 3, h, w) in [0, 1] to start from.
        corners: (N, 2) to start at.
        descent: steps and their rule.
        relocate: moves corners once a step; None: they stay. It judges a move by the texture before the step, whose
            loss where it lies is known, so that a move is never credited with what the step achieved.
    """
    patches = patches.detach().clone().requires_grad_()
    optimizer = descent.optimizer(patches)
    best: Attempt | None = None
    for step in range(1, descent.steps + 1):
        attempt = problem.attempt(patches, corners)
        (gradient,) = torch.autograd.grad(attempt.losses.sum(), patches)
        attempt = attempt.detach()
        best = attempt.better_of(best)
        if relocate is not None:
            corners, moved = relocate(problem, patches.detach(), corners, attempt)
            best = moved.better_of(best)
        descent.move(patches, gradient, optimizer, step=step)
    with torch.no_grad():
        return problem.attempt(patches, corners).better_of(best)


def best_of(attempts: Iterable[Attempt]) -> Attempt:
    """The best of several independent attempts, for every image."""
    return reduce(Attempt.better_of, attempts)


@plugin
class ImagePatch(PatchFields, ImageAttack):
    """A patch of its own for every image. A subclass says how each attempt is made."""

    @abstractmethod
    def attempts(self, inputs: ImageAttackInputs) -> Iterable[Attempt]:
        """Independent attempts at all images, of which the best is kept for every image."""
        ...

    def run(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator,
        precision: Precision | None = None,
    ) -> Tensor:
        """Patched images, each with a patch of its own. The model's parameters get no gradients.

        Args:
            model: in evaluation mode, at the precision to attack.
            images: (N, 3, H, W) in [0, 1].
            labels: (N,).
            generator: draws places, starts and whatever else the search draws.
            precision: not used; patches have 8 bit.

        Returns:
            (N, 3, H, W) in [0, 1]; pixels outside the masks are those of the images.

        Raises:
            UsageError: the patch does not fit on the images or beside the box, or the model has no class `target`.
        """
        mask = self.mask((images.shape[-2], images.shape[-1])).to(images.device)
        inputs = ImageAttackInputs(model=model, images=images, labels=labels, mask=mask, generator=generator)
        return best_of(self.attempts(inputs)).images
