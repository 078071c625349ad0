"""What an attack on single images wants, and how far it came: goals, results, and the better of two results."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from qadtr_brevitas.attacks.losses import AttackLoss, attack_loss, check_target


@dataclass(frozen=True)
class AttackResult:
    """One adversarial version of every image, and how it does.

    Args:
        images: (N, C, H, W) in [0, 1], what the network saw.
        losses: (N,), lower is better.
        success: (N,) boolean, whether the network predicted what the attack wants. It ranks results only; whether the
            attack counts as successful is decided by the evaluation.
    """

    images: Tensor
    losses: Tensor
    success: Tensor

    def detach(self) -> AttackResult:
        """Return the result without the autograd graph."""
        return AttackResult(self.images.detach(), self.losses.detach(), self.success)

    def beats(self, other: AttackResult) -> Tensor:
        """Return (N,) boolean: a success where the other failed, or a lower loss where both did alike.

        By loss alone a failure could win: cross-entropy to one class may be low while another class is lower still.
        """
        # Anything is better than a loss that is not a number, which compares as false both ways.
        lower = self.losses < other.losses.where(~other.losses.isnan(), torch.inf)
        return torch.where(self.success == other.success, lower, self.success)

    def replace_where(self, mask: Tensor, other: AttackResult) -> AttackResult:
        """Return the other result at the images where the mask (N,) is true, this one elsewhere."""
        return AttackResult(
            torch.where(mask[:, None, None, None], other.images, self.images),
            torch.where(mask, other.losses, self.losses),
            torch.where(mask, other.success, self.success),
        )

    def or_better(self, other: AttackResult | None) -> AttackResult:
        """Return the better of the two results for every image; of equal ones this one."""
        return self if other is None else self.replace_where(other.beats(self), other)

    def subset(self, index: Tensor) -> AttackResult:
        """Return the result at some of the images."""
        return AttackResult(self.images[index], self.losses[index], self.success[index])

    def index_copy(self, index: Tensor, other: AttackResult) -> AttackResult:
        """Return this result with the rows of the other one at `index`, as torch.index_copy does."""
        return AttackResult(
            self.images.index_copy(0, index, other.images),
            self.losses.index_copy(0, index, other.losses),
            self.success.index_copy(0, index, other.success),
        )


def best_per_image(results: Iterable[AttackResult]) -> AttackResult:
    """Return the best of several results for every image; of equal ones the first."""
    return reduce(AttackResult.or_better, results)


@dataclass(frozen=True)
class AttackGoal:
    """What an attack wants the network to predict for every image.

    Args:
        labels: (N,), the true classes.
        targets: (N,) classes to be predicted instead; None: any wrong one.
        loss: what is descended.
    """

    labels: Tensor
    targets: Tensor | None
    loss: AttackLoss

    @classmethod
    def of(cls, target: int | None, labels: Tensor, *, loss: AttackLoss) -> AttackGoal:
        """Return the goal with the same target class for every image, or with none."""
        return cls(labels, None if target is None else torch.full_like(labels, target), loss)

    def assess(self, images: Tensor, logits: Tensor) -> AttackResult:
        """Return how images do whose logits are (N, classes); differentiable in the logits.

        Raises:
            UsageError: the model has no such target class.
        """
        predictions = logits.argmax(1)
        if self.targets is None:
            success = predictions != self.labels
        else:
            check_target(int(self.targets.max()), classes=logits.shape[1])
            success = predictions == self.targets
        return AttackResult(images, attack_loss(self.loss, logits, self.labels, self.targets), success)

    def subset(self, index: Tensor) -> AttackGoal:
        """Return the goal for some of the images."""
        return AttackGoal(self.labels[index], None if self.targets is None else self.targets[index], self.loss)
