"""G8 and G16: gradients that are not there, and a loss too rough for them to mean anything."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qadtr_brevitas.audit.context import Context
from qadtr_brevitas.audit.finding import Verdict
from qadtr_brevitas.audit.objectives import margin
from qadtr_brevitas.audit.significance import deviations

NOISE_WIDTH = 8 / 255
ROUGH_ABOVE = 0.1


def usable_gradients(context: Context) -> Verdict:
    """Images whose patch has no gradient to start with, or one that is no number."""
    trace = context.longest
    zero, broken = int(trace.zero[0].sum()), int(trace.broken.any(0).sum())
    numbers = {
        "images without gradient": float(zero),
        "images with NaN or infinite gradient": float(broken),
        "images": float(len(context)),
        "share of steps without gradient": trace.zero.float().mean().item(),
    }
    if zero or broken:
        return Verdict(
            "WARN",
            f"{zero} images give the patch no gradient and {broken} one that is no number: the attack is blind there; "
            "use a margin loss or a lower temperature (G12), another source (G13) or no gradients at all (G5)",
            numbers,
        )
    return Verdict("pass", "every image gives its patch a finite gradient that is not zero", numbers)


def smooth_loss(context: Context) -> Verdict:
    """Mean relative change of the margin in random directions in the patch (after IoAF, Pintor et al. 2022).

    The margin, because the cross-entropy of a confident network is too small to be divided by.
    """
    start = context.start()
    center = _margins(context, start)
    draw, directions = context.generator("directions"), context.profile.directions
    changes = torch.zeros_like(center)
    for _ in range(directions):
        noise = torch.rand(len(context.batch), *start.shape[1:], generator=draw).to(start.device)[context.correct]
        moved = _margins(context, (start + (noise - 0.5) * NOISE_WIDTH).clamp(0, 1))
        changes += (moved - center).abs() / directions
    sizes = center.abs()
    change = (changes.sum() / sizes.sum()).item()
    # Of a ratio of two means, by its linear part.
    spread = (changes - change * sizes).std(unbiased=False) / sizes.mean()
    noise_of_change = deviations() * spread.item() / math.sqrt(len(context))
    numbers = {"relative change": change, "noise": noise_of_change, "directions": float(directions)}
    if change - noise_of_change > ROUGH_ABOVE:
        return Verdict(
            "WARN",
            f"noise of {NOISE_WIDTH:.3f} in the patch changes the loss by {change:.0%}: gradients tell little of the "
            "way ahead; average them over noise or draws, or attack without gradients (G5)",
            numbers,
        )
    return Verdict("pass", "the loss changes little under small noise, so gradients mean something", numbers)


def _margins(context: Context, patches: Tensor) -> Tensor:
    """(n,) margins of patched images, in double precision on the CPU."""
    found: list[Tensor] = []
    with torch.no_grad():
        for chunk in torch.arange(len(patches), device=patches.device).split(context.batch_size):
            scene = context.scene.only(chunk)
            found.append(margin(context.victim.logits(scene.put(patches[chunk])), scene.labels).cpu().double())
    return torch.cat(found)
