"""The images that choose among patches: which of them count, and how many a patch turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import Model
from qadtr_brevitas.attacks.losses import check_target
from qadtr_brevitas.core.errors import DataError
from qadtr_brevitas.core.seeding import generator


@dataclass(frozen=True)
class HeldOut:
    """Images to choose a patch on: classified correctly without it and, if targeted, not of the target class.

    They only rank textures; the reported success rate comes from the evaluation.

    Args:
        images: (N, C, H, W), uint8 or float in [0, 1].
        labels: (N,), the true classes.
        target: class to be predicted; None for any wrong one.
    """

    images: Tensor
    labels: Tensor
    target: int | None

    @classmethod
    def select(cls, model: Model, images: Tensor, labels: Tensor, *, target: int | None, batch_size: int) -> HeldOut:
        """Keep the images that count.

        Raises:
            UsageError: the model has no class `target`.
            DataError: no image counts.
        """
        logits = _logits(model, images, batch_size)
        if target is not None:
            check_target(target, classes=logits.shape[1])
        counts = logits.argmax(1) == labels
        if target is not None:
            counts &= labels != target
        if not bool(counts.any()):
            raise DataError(
                "the model classifies no held-out image correctly that is not of the target class: "
                "give more held-out images or check that model and data set belong together"
            )
        return cls(images[counts], labels[counts], target)

    def success_rate(self, model: Model, apply_patch: Callable[[Tensor], Tensor], *, batch_size: int) -> float:
        """Return the share of images that, with the patch, are classified as the target (or, untargeted, wrongly)."""
        predictions = _logits(lambda images: model(apply_patch(images)), self.images, batch_size).argmax(1)
        success = predictions != self.labels if self.target is None else predictions == self.target
        return success.float().mean().item()


def divide_for_choice(images: Tensor, labels: Tensor, *, seed: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Take a fifth of the images, at random, to choose the best patch on.

    Args:
        images: (N, C, H, W).
        labels: (N,).
        seed: decides which.

    Returns:
        The images and labels to make patches on, and the pair to choose on.

    Raises:
        DataError: there are fewer than 5 images.
    """
    count = len(images) // 5
    if count == 0:
        raise DataError(
            f"{len(images)} images are too few to make a patch on some and choose it on others: give 5 or more"
        )
    order = torch.randperm(len(images), generator=generator(seed, "held-out images")).to(images.device)
    chosen, rest = order[:count], order[count:]
    return images[rest], labels[rest], (images[chosen], labels[chosen])


def as_float(images: Tensor) -> Tensor:
    """Return images in [0, 1], given uint8 or float ones."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


@torch.no_grad()
def _logits(model: Model, images: Tensor, batch_size: int) -> Tensor:
    return torch.cat([model(as_float(batch)) for batch in images.split(batch_size)])
