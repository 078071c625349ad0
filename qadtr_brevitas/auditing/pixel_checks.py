"""G21: is PGD, by which figures of pixel attacks go, weaker than AutoAttack?

At few bits the gradients that pass straight through the quantizers may point nowhere, and PGD then leaves images that
targeted searches and a search without gradients break.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from qadtr_brevitas.attacks.autoattack import AutoAttack
from qadtr_brevitas.attacks.base import PixelAttack
from qadtr_brevitas.attacks.pixel import Pgd
from qadtr_brevitas.auditing.context import AuditContext
from qadtr_brevitas.auditing.finding import CheckResult, skipped
from qadtr_brevitas.auditing.significance import compare
from qadtr_brevitas.core.errors import UsageError

PIXEL_THRESHOLD = 0.05
"""Gain of the success rate that does not matter: AutoAttack is a few points stronger on any network."""

EPS = 0.03
"""Largest change of a pixel value."""


def pixel_attacks(context: AuditContext) -> CheckResult:
    """Compare PGD, from two starts, with AutoAttack on the images that its first start leaves.

    Neither counts for the worst case, which is over patches.
    """
    if context.is_random:
        return skipped("needs a network with fixed outputs: evaluate --attack '{name: autoattack, version: rand}'")
    steps = context.profile.pixel_steps
    pgd, auto = Pgd(eps=EPS, steps=steps), AutoAttack(eps=EPS, version=context.profile.autoattack)
    everything = torch.arange(len(context))
    # Its remarks on gradients are what G8 finds.
    log = logging.getLogger("auto-attack")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        first = _broken(context, pgd, everything, start=0)
        left = (~first).nonzero().flatten()
        again = first | _broken(context, pgd, left, start=1)
        ensemble = first | _broken(context, auto, left, start=0)
    # The libraries are an extra, and AutoAttack needs four classes.
    except UsageError as error:
        return skipped(str(error))
    finally:
        log.setLevel(level)
    name = f"pgd {steps} steps"
    comparison = compare(
        again, {f"{name} and autoattack": ensemble}, base_name=f"{name}, two starts", threshold=PIXEL_THRESHOLD
    )
    numbers = {f"asr {name}": first.float().mean().item(), **comparison.numbers, "eps": EPS}
    if comparison.is_better:
        return CheckResult(
            "WARN",
            f"AutoAttack leaves {1 - ensemble.float().mean().item():.1%} of the images, PGD "
            f"{1 - again.float().mean().item():.1%}: robustness to pixel attacks by PGD alone is overstated, report "
            "--attack autoattack",
            numbers,
        )
    return CheckResult("pass", "AutoAttack breaks hardly more images than PGD", numbers)


def _broken(context: AuditContext, attack: PixelAttack, index: Tensor, *, start: int) -> Tensor:
    """Return (n,) which of the images numbered in `index` an attack breaks."""
    broken = torch.zeros(len(context), dtype=torch.bool)
    attacked = context.attacked
    for number, chunk in enumerate(index.split(context.batch_size)):
        there = chunk.to(attacked.images.device)
        images, labels = attacked.images[there], attacked.labels[there]
        draws = context.generator("pixel attacks", start, number)
        if len(chunk):
            broken[chunk] = context.is_wrong(
                attack.run(context.audited.logits, images, labels, generator=draws), labels
            ).cpu()
    return broken
