"""G12 and G14: other losses than the cross-entropy of the true class."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qadtr_brevitas.audit.context import Context
from qadtr_brevitas.audit.finding import Verdict
from qadtr_brevitas.audit.objectives import DLR_CLASSES, Objective, dlr, margin, tempered, towards
from qadtr_brevitas.audit.significance import compare

TEMPERATURES = (0.01, 0.1, 10.0, 100.0)
LOSS_THRESHOLD, TARGETED_THRESHOLD = 0.01, 0.01


def other_losses(context: Context) -> Verdict:
    """Logits times a factor in the cross-entropy (Gupta and Ajanthan 2020), the margin, and its ratio (DLR)."""
    objectives: dict[str, Objective] = {f"logits x {factor:g}": tempered(factor) for factor in TEMPERATURES}
    objectives["margin"] = margin
    with torch.no_grad():
        classes = context.victim.logits(context.batch[:1]).shape[1]
    if classes >= DLR_CLASSES:
        objectives["dlr"] = dlr
    found = {name: context.attack(context.victim.logits, objective=loss) for name, loss in objectives.items()}
    comparison = compare(context.compared, found, base_name="cross-entropy", threshold=LOSS_THRESHOLD)
    if comparison.is_better:
        return Verdict(
            "WARN",
            f"the loss '{comparison.best}' breaks more images than cross-entropy, whose gradients the scale of the "
            "logits spoils: report the attack with that loss",
            comparison.numbers,
        )
    return Verdict("pass", "no temperature and no margin loss is better than cross-entropy", comparison.numbers)


def targeted(context: Context) -> Verdict:
    """The most likely wrong class as target, any wrong class as success."""
    scene = replace(context.scene, aims=_likeliest_wrong(context))
    found = {"likeliest wrong class": context.attack(context.victim.logits, objective=towards, scene=scene)}
    comparison = compare(context.compared, found, base_name="untargeted", threshold=TARGETED_THRESHOLD)
    if comparison.is_better:
        return Verdict(
            "WARN",
            "aiming at the likeliest wrong class breaks more images than aiming away from the right one: report the "
            "better of the two for each image",
            comparison.numbers,
        )
    return Verdict("pass", "aiming at the likeliest wrong class is no better", comparison.numbers)


def _likeliest_wrong(context: Context) -> Tensor:
    """(n,) the wrong class with the largest logit on each clean image."""
    scene = context.scene
    with torch.no_grad():
        logits = torch.cat([context.victim.logits(batch) for batch in scene.images.split(context.batch_size)])
    return logits.scatter(1, scene.labels[:, None], -torch.inf).argmax(1)
