"""G8 and G16: are there gradients, and is the loss smooth enough for them to mean anything?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qadtr_brevitas.auditing.context import AuditContext
from qadtr_brevitas.auditing.finding import CheckResult
from qadtr_brevitas.auditing.losses import margin
from qadtr_brevitas.auditing.significance import deviations

NOISE_WIDTH = 8 / 255
"""Width of the interval that random changes of a pixel come from."""

ROUGH_ABOVE = 0.1
"""Relative change of the loss above which it is called rough."""


def usable_gradients(context: AuditContext) -> CheckResult:
    """Count images whose first patch has no gradient, and images with a gradient that is not finite."""
    trace = context.longest
    zero, not_finite = int(trace.zero[0].sum()), int(trace.not_finite.any(0).sum())
    numbers = {
        "images without gradient": float(zero),
        "images with NaN or infinite gradient": float(not_finite),
        "images": float(len(context)),
        "share of steps without gradient": trace.zero.float().mean().item(),
    }
    if zero or not_finite:
        return CheckResult(
            "WARN",
            f"the patch has no gradient on {zero} images, and one that is not finite on {not_finite}: there the attack "
            "is blind; use a margin loss or a lower temperature (G12), another source (G13) or no gradients (G5)",
            numbers,
        )
    return CheckResult("pass", "every image gives its patch a finite gradient that is not zero", numbers)


def smooth_loss(context: AuditContext) -> CheckResult:
    """Measure the mean relative change of the margin in random directions (after IoAF, Pintor et al. 2022).

    The margin, because the cross-entropy of a confident network is too small to be divided by.
    """
    start = context.start()
    center = _margins(context, start)
    draw, directions = context.generator("directions"), context.profile.directions
    changes = torch.zeros_like(center)
    for _ in range(directions):
        noise = torch.rand(len(context.images), *start.shape[1:], generator=draw).to(start.device)[context.correct]
        moved = _margins(context, (start + (noise - 0.5) * NOISE_WIDTH).clamp(0, 1))
        changes += (moved - center).abs() / directions
    sizes = center.abs()
    change = (changes.sum() / sizes.sum()).item()
    # Of a ratio of two means, by its linear part.
    spread = (changes - change * sizes).std(unbiased=False) / sizes.mean()
    noise_of_change = deviations() * spread.item() / math.sqrt(len(context))
    numbers = {"relative change": change, "noise": noise_of_change, "directions": float(directions)}
    if change - noise_of_change > ROUGH_ABOVE:
        return CheckResult(
            "WARN",
            f"noise of {NOISE_WIDTH:.3f} in the patch changes the loss by {change:.0%}: gradients say little about "
            "larger steps; average them over noise or draws, or attack without gradients (G5)",
            numbers,
        )
    return CheckResult("pass", "the loss changes little under small noise, so gradients mean something", numbers)


def _margins(context: AuditContext, patches: Tensor) -> Tensor:
    """Return the margins (n,) of patched images, in double precision on the CPU."""
    margins: list[Tensor] = []
    with torch.no_grad():
        for chunk in context.chunks(len(patches)):
            attacked = context.attacked.subset(chunk)
            margins.append(
                margin(context.audited.logits(attacked.with_patches(patches[chunk])), attacked.labels).cpu().double()
            )
    return torch.cat(margins)
