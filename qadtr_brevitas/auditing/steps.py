"""G1, G2, G4 and G15: whether the white-box attack was long enough, and kept what it found."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qadtr_brevitas.auditing.context import AuditContext
from qadtr_brevitas.auditing.finding import Verdict, skipped
from qadtr_brevitas.auditing.search import cross_entropy, gradient_of
from qadtr_brevitas.auditing.significance import compare, deviations, rate

RISE_THRESHOLD, KEPT_THRESHOLD = 0.01, 0.01
PLATEAU_STEPS, PLATEAU_THRESHOLD = 10, 0.05
FEWEST_LEFT = 10
"""Fewer unbroken images than this are too few to change a success rate."""

SINGLE_STEPS = (0.25, 0.5, 1.0)
_STOOD_STILL = "the loss of no image moved, so there is nothing to judge: see G8 and G5"


def more_steps(context: AuditContext) -> Verdict:
    """Success after k, 2k and 4k steps, and of several short attacks."""
    if _stood_still(context):
        return skipped(_STOOD_STILL)
    k = context.profile.steps
    comparison = compare(
        context.after[2 * k],
        {f"{4 * k} steps": context.longest_breaks},
        base_name=f"{2 * k} steps",
        threshold=RISE_THRESHOLD,
    )
    numbers = {f"asr {k} steps": rate(context.after[k]), **comparison.numbers}
    numbers[f"asr {k} steps, {context.profile.restarts} restarts"] = rate(context.restarts_break)
    if comparison.is_better:
        return Verdict(
            "WARN", "more steps still break more images: the attack was not finished, give it more steps", numbers
        )
    return Verdict("pass", "twice the steps do not break more images than chance would", numbers)


def plateau(context: AuditContext) -> Verdict:
    """Whether the loss still falls (IoAF, Pintor et al. 2022), on images that the attack did not break."""
    left = ~context.longest_breaks
    numbers: dict[str, float] = {"images left": float(left.sum())}
    if int(left.sum()) < FEWEST_LEFT:
        return Verdict("pass", f"the attack breaks all images but {int(left.sum())}: it was long enough", numbers)
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
        return Verdict(
            "WARN", "the loss still falls when the attack ends: give it more steps before believing its ASR", numbers
        )
    return Verdict("pass", "the loss does not clearly fall any more when the attack ends", numbers)


def single_step(context: AuditContext) -> Verdict:
    """One step of several sizes from the same start against all steps."""
    if _stood_still(context):
        return skipped(_STOOD_STILL)
    start = context.start()
    direction = _first_direction(context, start)
    found = {f"one step of {size:g}": context.judge((start - size * direction).clamp(0, 1)) for size in SINGLE_STEPS}
    comparison = compare(context.compared, found, base_name=f"{context.profile.compared_steps} steps")
    if comparison.is_better:
        return Verdict(
            "WARN",
            f"{comparison.best} breaks more images than many small ones: the gradients along the way mislead, "
            "look for masking (G8, G12, G16)",
            comparison.numbers,
        )
    return Verdict("pass", "a single step is no better than many", comparison.numbers)


def best_kept(context: AuditContext) -> Verdict:
    """The best patches of the longest attack against its last ones."""
    if _stood_still(context):
        return skipped(_STOOD_STILL)
    last = context.judge(context.longest.last)
    comparison = compare(
        last, {"best kept": context.longest_breaks}, base_name="last patches", threshold=KEPT_THRESHOLD
    )
    if comparison.is_better:
        return Verdict(
            "WARN",
            "patches that worked on the way were lost by the last step: report attacks that keep their best patch, "
            "as this audit does, or smaller steps",
            comparison.numbers,
        )
    return Verdict("pass", "the last patches are as good as the best ones on the way", comparison.numbers)


def _stood_still(context: AuditContext) -> bool:
    losses = context.longest.losses
    return bool((losses == losses[0]).all())


def _first_direction(context: AuditContext, start: Tensor) -> Tensor:
    """Sign of the gradient of the loss in the patches to start from."""
    signs: list[Tensor] = []
    for chunk in torch.arange(len(start), device=start.device).split(context.batch_size):
        patches = start[chunk].requires_grad_()
        scene = context.scene.only(chunk)
        loss = cross_entropy(context.victim.logits(scene.put(patches)), scene.labels)
        signs.append(gradient_of(loss, patches).nan_to_num(0, 0, 0).sign())
    return torch.cat(signs)
