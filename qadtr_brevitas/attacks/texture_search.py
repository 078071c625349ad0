"""The search of a universal texture: batches of images, steps, and the best texture by the held-out score."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from qadtr_brevitas.attacks.descent import OptimizerSteps, Variable, descend
from qadtr_brevitas.attacks.fake_quantize import PATCH_FILE_BITS, fake_quantize
from qadtr_brevitas.attacks.held_out import as_float
from qadtr_brevitas.core.errors import TrainingError

TextureLoss: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(texture, images, labels) -> loss to be made small."""

TextureScore: TypeAlias = Callable[[Tensor], float]
"""Texture -> success rate on held-out images."""


@dataclass(frozen=True)
class ScoredTexture:
    """A texture on the 8-bit grid, and its held-out score."""

    texture: Tensor
    score: float


def search_texture(
    start: Tensor,
    images: Tensor,
    labels: Tensor,
    *,
    loss: TextureLoss,
    score: TextureScore,
    rule: OptimizerSteps,
    batch_size: int,
    check_every: int,
    generator: torch.Generator,
    report: Callable[[int, float], None] | None = None,
) -> ScoredTexture:
    """Optimize one texture on batches of images, and keep the best texture by score, not the last.

    The optimized texture is a float in [0, 1]. What the network sees, what is scored and what is returned is its 8-bit
    rounding, with the gradient passed straight through.

    Args:
        start: (C, h, w) in [0, 1].
        images: (N, C, H, W), uint8 or float in [0, 1], on the device to compute on.
        labels: (N,).
        loss: (texture, images, labels) -> scalar to be made small. Draws placements and the like itself.
        score: texture -> success rate on held-out images. The same texture must score the same.
        rule: number, size and kind of the steps.
        batch_size: images per step.
        check_every: steps between two scores.
        generator: draws the batches.
        report: called after every step with the number of steps done and the best score so far.

    Raises:
        TrainingError: the texture is no longer finite.
    """
    first = round_checked(start, step=0)
    # Where gradients lead nowhere, the start may be the best there is.
    best = ScoredTexture(first, score(first))
    batches = endless_batches(len(images), batch_size, generator)

    def batch_loss(texture: Tensor) -> Tensor:
        index = next(batches)
        return loss(fake_quantize(texture, PATCH_FILE_BITS), as_float(images[index]), labels[index])

    def keep_best(step: int, texture: Tensor) -> None:
        nonlocal best
        if step % check_every == 0 or step == rule.steps:
            rounded = round_checked(texture, step=step)
            checked = ScoredTexture(rounded, score(rounded))
            # Of equal scores the later texture is kept: it has the lower loss.
            best = checked if checked.score >= best.score else best
        if report is not None:
            report(step, best.score)

    descend([Variable(start, rule)], batch_loss, steps=rule.steps, after_step=keep_best)
    return best


def endless_batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield indices of batches without end; every image once before any twice."""
    while True:
        order = torch.randperm(count, generator=generator, device=generator.device)
        # A short last batch would weigh its images more; with few images it is all there is.
        full = count - count % batch_size if count >= batch_size else count
        yield from order[:full].split(batch_size)


@torch.no_grad()
def round_checked(texture: Tensor, *, step: int) -> Tensor:
    """Return the texture on the 8-bit grid.

    Raises:
        TrainingError: the texture is no longer finite.
    """
    if not bool(texture.isfinite().all()):
        raise TrainingError(
            f"the patch is not finite after step {step}: check the model's outputs, or give a smaller lr"
        )
    return fake_quantize(texture, PATCH_FILE_BITS)
