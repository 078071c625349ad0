"""G12 and G14: are other losses better than the cross-entropy of the true class?"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qadtr_brevitas.auditing.context import AuditContext
from qadtr_brevitas.auditing.finding import CheckResult
from qadtr_brevitas.auditing.losses import (
    DLR_CLASSES,
    LogitLoss,
    dlr,
    margin,
    scaled_cross_entropy,
    targeted_cross_entropy,
)
from qadtr_brevitas.auditing.significance import compare

TEMPERATURES = (0.01, 0.1, 10.0, 100.0)
"""Factors on the logits."""

LOSS_THRESHOLD, TARGETED_THRESHOLD = 0.01, 0.01
"""Gains of the success rate that do not matter."""


def other_losses(context: AuditContext) -> CheckResult:
    """Try the cross-entropy of scaled logits (Gupta and Ajanthan 2020), the margin, and its ratio (DLR)."""
    losses: dict[str, LogitLoss] = {f"logits x {factor:g}": scaled_cross_entropy(factor) for factor in TEMPERATURES}
    losses["margin"] = margin
    with torch.no_grad():
        classes = context.audited.logits(context.images[:1]).shape[1]
    if classes >= DLR_CLASSES:
        losses["dlr"] = dlr
    broken = {
        name: context.broken_with_gradients_of(context.audited.logits, loss=loss) for name, loss in losses.items()
    }
    comparison = compare(context.baseline, broken, base_name="cross-entropy", threshold=LOSS_THRESHOLD)
    if comparison.is_better:
        return CheckResult(
            "WARN",
            f"the loss '{comparison.best}' breaks more images than cross-entropy, whose gradients suffer from the "
            "scale of the logits: report the attack with that loss",
            comparison.numbers,
        )
    return CheckResult("pass", "no temperature and no margin loss is better than cross-entropy", comparison.numbers)


def targeted(context: AuditContext) -> CheckResult:
    """Aim at the likeliest wrong class; any wrong class counts as success."""
    attacked = replace(context.attacked, targets=_likeliest_wrong(context))
    broken = {
        "likeliest wrong class": context.broken_with_gradients_of(
            context.audited.logits, loss=targeted_cross_entropy, attacked=attacked
        )
    }
    comparison = compare(context.baseline, broken, base_name="untargeted", threshold=TARGETED_THRESHOLD)
    if comparison.is_better:
        return CheckResult(
            "WARN",
            "aiming at the likeliest wrong class breaks more images than aiming away from the right one: report the "
            "better of the two for each image",
            comparison.numbers,
        )
    return CheckResult("pass", "aiming at the likeliest wrong class is no better", comparison.numbers)


def _likeliest_wrong(context: AuditContext) -> Tensor:
    """Return (n,) the wrong class with the largest logit on each clean image."""
    attacked = context.attacked
    with torch.no_grad():
        logits = torch.cat([context.audited.logits(batch) for batch in attacked.images.split(context.batch_size)])
    return logits.scatter(1, attacked.labels[:, None], -torch.inf).argmax(1)
