"""How far gradients at two precisions agree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qadtr_brevitas.precision import Precision
from qadtr_brevitas.sources import logits_at, parse_access

_NORMAL = 1.96


@dataclass(frozen=True)
class Average:
    """A mean over images with its 95 % interval, which is None for a figure that is no mean."""

    value: float | None
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, values: Tensor) -> Average:
        """The mean of (n,) values, by the normal approximation."""
        n = len(values)
        if n == 0:
            return cls(None, None, None, 0)
        value = float(values.mean())
        margin = _NORMAL * float(values.std()) / n**0.5 if n > 1 else None
        return cls(value, None if margin is None else value - margin, None if margin is None else value + margin, n)


def input_gradients(
    model: nn.Module, precision: Precision, images: Tensor, labels: Tensor, *, batch_size: int
) -> Tensor:
    """Gradient of each image's cross-entropy with its label, (N, 3, H, W).

    Args:
        model: a switchable model in eval mode and `frozen_weights`.
        precision: where to take it.
        images: (N, 3, H, W) in [0, 1].
        labels: (N,).
        batch_size: images in one pass.
    """
    logits = logits_at(model, parse_access(precision))
    parts: list[Tensor] = []
    for some, truth in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        inputs = some.detach().clone().requires_grad_(True)
        # The sum: a mean would make each image's gradient depend on how many there are.
        loss = F.cross_entropy(logits(inputs), truth, reduction="sum")
        parts += torch.autograd.grad(loss, inputs)
    return torch.cat(parts)


def cosines(gradients: Tensor, reference: Tensor, region: Tensor) -> Tensor:
    """Cosine of the angle between two gradients of every image, (n,); images where one of them is zero are left out.

    Args:
        gradients: (N, 3, H, W).
        reference: (N, 3, H, W).
        region: boolean (N, 1, H, W), the pixels that count.
    """
    ours, theirs = ((g * region).flatten(1).cpu().double() for g in (gradients, reference))
    norms = ours.norm(dim=1) * theirs.norm(dim=1)
    there = norms > 0
    return (ours * theirs).sum(dim=1)[there] / norms[there]


def squared_errors(gradients: Tensor, reference: Tensor, region: Tensor) -> tuple[Tensor, float | None]:
    """Mean squared difference of every image's two gradients, (N,); and their sum as a share of the reference's.

    The share says what the errors alone do not: gradients of confident images are tiny, and so are their errors. It is
    None where the reference has no gradient at all.
    """
    difference = ((gradients - reference) * region).flatten(1).cpu().double().square().sum(dim=1)
    size = (reference * region).flatten(1).cpu().double().square().sum(dim=1)
    values = region.flatten(1).sum(dim=1).cpu() * gradients.shape[1]
    total = float(size.sum())
    return difference / values, float(difference.sum()) / total if total else None
