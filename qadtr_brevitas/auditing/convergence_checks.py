"""G1, G2, G4 and G15: did the white-box attack run long enough, and keep its best patches?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qadtr_brevitas.attacks.gradients import gradient_or_zero
from qadtr_brevitas.auditing.context import AuditContext
from qadtr_brevitas.auditing.finding import CheckResult, skipped
from qadtr_brevitas.auditing.losses import cross_entropy
from qadtr_brevitas.auditing.significance import compare, deviations, rate

RISE_THRESHOLD, KEPT_THRESHOLD = 0.01, 0.01
"""Gains of the success rate that do not matter."""

PLATEAU_STEPS, PLATEAU_THRESHOLD = 10, 0.05
"""The last steps, and the share of the loss's whole fall that may happen in them."""

FEWEST_LEFT = 10
"""Fewer unbroken images than this are too few to change a success rate."""

SINGLE_STEPS = (0.25, 0.5, 1.0)
"""Sizes of a single step, in pixel values."""

_NO_PROGRESS = "the attack changed the loss of no image, so there is nothing to judge: see G8 and G5"


def more_steps(context: AuditContext) -> CheckResult:
    """Compare the success after k, 2k and 4k steps, and of several short attacks."""
    if _made_no_progress(context):
        return skipped(_NO_PROGRESS)
    k = context.profile.steps
    comparison = compare(
        context.broken_after[2 * k],
        {f"{4 * k} steps": context.broken_by_longest},
        base_name=f"{2 * k} steps",
        threshold=RISE_THRESHOLD,
    )
    numbers = {f"asr {k} steps": rate(context.broken_after[k]), **comparison.numbers}
    numbers[f"asr {k} steps, {context.profile.restarts} restarts"] = rate(context.broken_by_restarts)
    if comparison.is_better:
        return CheckResult(
            "WARN", "more steps still break more images: the attack was not finished, give it more steps", numbers
        )
    return CheckResult("pass", "twice the steps do not break more images than chance would", numbers)


def plateau(context: AuditContext) -> CheckResult:
    """Check whether the loss still falls (IoAF, Pintor et al. 2022), on images that the attack did not break."""
    left = ~context.broken_by_longest
    numbers: dict[str, float] = {"images left": float(left.sum())}
    if int(left.sum()) < FEWEST_LEFT:
        return CheckResult("pass", f"the attack breaks all images but {int(left.sum())}: it was long enough", numbers)
    lowest = context.longest.losses[:, left].cpu().double().cummin(0).values
    fallen = lowest[0] - lowest[-1]
    moved = fallen > 0
    if int(moved.sum()) < FEWEST_LEFT:
        return skipped(f"the loss moved on only {int(moved.sum())} of the {int(left.sum())} images left: see G8 and G5")
    late = ((lowest[-1 - PLATEAU_STEPS] - lowest[-1]) / fallen)[moved]
    noise = deviations() * (late.std(unbiased=False) / math.sqrt(len(late))).item()
    share = late.mean().item()
    numbers |= {f"fall in the last {PLATEAU_STEPS} steps": share, "noise": noise}
    if share - noise > PLATEAU_THRESHOLD:
        return CheckResult(
            "WARN", "the loss still falls when the attack ends: give it more steps before you believe its ASR", numbers
        )
    return CheckResult(
        "pass", "the loss has stopped falling when the attack ends, as far as these images can show", numbers
    )


def single_step(context: AuditContext) -> CheckResult:
    """Compare one step of several sizes with all steps, from the same start."""
    if _made_no_progress(context):
        return skipped(_NO_PROGRESS)
    start = context.start()
    direction = _first_direction(context, start)
    broken = {
        f"one step of {size:g}": context.broken_by((start - size * direction).clamp(0, 1)) for size in SINGLE_STEPS
    }
    comparison = compare(context.baseline, broken, base_name=f"{context.profile.compared_steps} steps")
    if comparison.is_better:
        return CheckResult(
            "WARN",
            f"{comparison.best} breaks more images than many small ones: the gradients along the way mislead, "
            "look for masking (G8, G12, G16)",
            comparison.numbers,
        )
    return CheckResult("pass", "a single step is no better than many", comparison.numbers)


def best_kept(context: AuditContext) -> CheckResult:
    """Compare the best patches of the longest attack with its last ones."""
    if _made_no_progress(context):
        return skipped(_NO_PROGRESS)
    last = context.broken_by(context.longest.last)
    comparison = compare(
        last, {"best kept": context.broken_by_longest}, base_name="last patches", threshold=KEPT_THRESHOLD
    )
    if comparison.is_better:
        return CheckResult(
            "WARN",
            "patches that worked were lost again by the last step: report attacks that keep their best patch, as this "
            "audit does, or take smaller steps",
            comparison.numbers,
        )
    return CheckResult("pass", "the last patches are as good as the best ones", comparison.numbers)


def _made_no_progress(context: AuditContext) -> bool:
    """Return whether the longest attack changed no loss."""
    losses = context.longest.losses
    return bool((losses == losses[0]).all())


def _first_direction(context: AuditContext, start: Tensor) -> Tensor:
    """Return the sign of the gradient of the loss in the first patches."""
    signs: list[Tensor] = []
    for chunk in context.chunks(len(start)):
        patches = start[chunk].requires_grad_()
        attacked = context.attacked.subset(chunk)
        loss = cross_entropy(context.audited.logits(attacked.with_patches(patches)), attacked.labels)
        signs.append(gradient_or_zero(loss, patches).nan_to_num(0, 0, 0).sign())
    return torch.cat(signs)
