"""The loop that makes a universal texture: batches, steps, and keeping the best on held-out images.

How pixels follow a gradient: step rules, the step size over time, and the range that is never left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import Model
from qadtr_brevitas.attacks.fake_quantize import PATCH_FILE_BITS, fake_quantize
from qadtr_brevitas.attacks.losses import check_target
from qadtr_brevitas.core.errors import DataError, TrainingError

StepRule: TypeAlias = Literal["sgd", "sign", "adam"]


@dataclass(frozen=True, kw_only=True)
class Descent:
    """Steps of one rule.

    Args:
        steps: how many there will be.
        step_rule: `sgd` follows the raw gradient, `sign` its sign, `adam` Adam.
        lr: step size at the start; of `sign`, in pixel values.
        cosine: True to let the step size fall to zero along a cosine.
    """

    steps: int
    step_rule: StepRule
    lr: float
    cosine: bool

    def optimizer(self, values: Tensor) -> torch.optim.Optimizer:
        """What `move` needs to move `values`; Adam remembers earlier gradients in it."""
        if self.step_rule == "adam":
            return torch.optim.Adam([values], lr=self.lr)
        return torch.optim.SGD([values], lr=self.lr)

    def move(self, values: Tensor, gradient: Tensor, optimizer: torch.optim.Optimizer, *, step: int) -> None:
        """Moves `values` in place, against the gradient, and clips them to [0, 1].

        Args:
            values: what the optimizer was made for.
            gradient: of the same shape.
            optimizer: of these values.
            step: number of the step, from 1.
        """
        # Assigned, never accumulated.
        values.grad = gradient.sign() if self.step_rule == "sign" else gradient
        for group in optimizer.param_groups:
            group["lr"] = self._step_size(step)
        optimizer.step()
        with torch.no_grad():
            values.clamp_(0, 1)

    def _step_size(self, step: int) -> float:
        if not self.cosine:
            return self.lr
        return self.lr * (1 + math.cos(math.pi * (step - 1) / self.steps)) / 2


Objective: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
Score: TypeAlias = Callable[[Tensor], float]


@dataclass(frozen=True, kw_only=True)
class Search(Descent):
    """How a texture is searched: steps, and what goes into them.

    Args:
        batch_size: images per step.
        check_every: steps between looks at the held-out score.
    """

    batch_size: int
    check_every: int


@dataclass(frozen=True)
class SearchResult:
    """The best texture of a search, on the 8-bit grid, and its held-out score."""

    texture: Tensor
    score: float


def search_texture(
    start: Tensor,
    images: Tensor,
    labels: Tensor,
    *,
    objective: Objective,
    score: Score,
    search: Search,
    generator: torch.Generator,
    report: Callable[[int, float], None] | None = None,
) -> SearchResult:
    """Descends the objective in the texture alone and keeps the best texture by score, not the last.

    The master texture is a float in [0, 1]. What the network sees, what is scored and what is returned is its 8-bit
    rounding, with the gradient passed straight through.

    Args:
        start: (3, h, w) in [0, 1].
        images: (N, 3, H, W), uint8 or float in [0, 1], on the device to compute on.
        labels: (N,).
        objective: (texture, images, labels) -> scalar to be made small. Draws placements and the like itself.
        score: texture -> success rate on held-out images. The same texture must score the same.
        search: step rule and budget.
        generator: draws the batches.
        report: called after every step with the number of steps done and the best score so far.

    Raises:
        TrainingError: the texture is no longer finite.
    """
    texture = start.detach().clone().requires_grad_()
    optimizer = search.optimizer(texture)
    first = round_checked(start, step=0)
    # Where gradients lead nowhere, the start may be the best there is.
    best = SearchResult(first, score(first))
    batches = endless_batches(len(images), search.batch_size, generator)
    for step in range(1, search.steps + 1):
        index = next(batches)
        batch = as_float(images[index]), labels[index]
        loss = objective(fake_quantize(texture, PATCH_FILE_BITS), *batch)
        # Nothing but the texture gets a gradient.
        (gradient,) = torch.autograd.grad(loss, texture)
        search.move(texture, gradient, optimizer, step=step)
        if step % search.check_every == 0 or step == search.steps:
            rounded = round_checked(texture, step=step)
            checked = SearchResult(rounded, score(rounded))
            # Of equals the later: it has the lower loss.
            best = checked if checked.score >= best.score else best
        if report is not None:
            report(step, best.score)
    return best


@dataclass(frozen=True)
class HeldOut:
    """Images to choose a patch on: classified correctly without it and, if targeted, not of the target class.

    This is a yardstick for choosing among textures; the reported success rate comes from the evaluation.
    """

    images: Tensor
    labels: Tensor
    target: int | None

    @classmethod
    def select(cls, model: Model, images: Tensor, labels: Tensor, *, target: int | None, batch_size: int) -> HeldOut:
        """Keeps the images that count.

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

    def success_rate(self, model: Model, apply: Callable[[Tensor], Tensor], *, batch_size: int) -> float:
        """Share of these images that, after `apply`, are classified as the target (or, untargeted, wrongly)."""
        predictions = _logits(lambda images: model(apply(images)), self.images, batch_size).argmax(1)
        success = predictions != self.labels if self.target is None else predictions == self.target
        return success.float().mean().item()


def as_float(images: Tensor) -> Tensor:
    """Images in [0, 1] from uint8 or float ones."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def endless_batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of batches without end; every image once before any twice."""
    while True:
        order = torch.randperm(count, generator=generator, device=generator.device)
        # A short last batch would weigh its images more; with few images it is all there is.
        full = count - count % batch_size if count >= batch_size else count
        yield from order[:full].split(batch_size)


@torch.no_grad()
def round_checked(texture: Tensor, *, step: int) -> Tensor:
    """The texture on the 8-bit grid.

    Raises:
        TrainingError: it is no longer finite.
    """
    if not bool(texture.isfinite().all()):
        raise TrainingError(
            f"the patch is not finite after step {step}: check the model's outputs or give a smaller lr"
        )
    return fake_quantize(texture, PATCH_FILE_BITS)


@torch.no_grad()
def _logits(model: Model, images: Tensor, batch_size: int) -> Tensor:
    return torch.cat([model(as_float(batch)) for batch in images.split(batch_size)])
