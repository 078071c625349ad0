"""G19: patches that start from pictures, for networks that are blind to noise and have no gradients there."""

from __future__ import annotations

import torch
from torch import Tensor

from qadtr_brevitas.attacks.per_image import PatchTask
from qadtr_brevitas.attacks.results import AttackGoal
from qadtr_brevitas.attacks.starts import start_patches
from qadtr_brevitas.auditing.context import AuditContext
from qadtr_brevitas.auditing.finding import CheckResult
from qadtr_brevitas.auditing.significance import compare

PICTURE_THRESHOLD = 0.002
"""Gain of the success rate that does not matter."""

PICTURE_STEP = 0.03
"""Larger steps wipe a picture out before they make anything of it."""


def pictures(context: AuditContext) -> CheckResult:
    """Compare starts at pictures with one more start at noise, on the images that the white-box attacks leave."""
    white_box = context.broken_by_white_box
    left = (~white_box).nonzero().flatten()
    numbers = {"images left by white-box": float(len(left))}
    if len(left) == 0:
        return CheckResult("pass", "the white-box attacks break every image", numbers)
    k, there = context.profile.steps, left.to(context.images.device)
    attacked = context.attacked.subset(there)
    patches = context.search(
        context.audited.logits, steps=k, attacked=attacked, start=_starts(context)[there], step_size=PICTURE_STEP
    ).best[k]
    from_pictures = context.record_broken(context.is_wrong(attacked.with_patches(patches), attacked.labels), left)
    from_noise = context.broken_by_restart(context.profile.restarts, left)
    comparison = compare(
        white_box | from_noise,
        {"white-box and pictures": white_box | from_pictures},
        base_name="white-box and another start",
        threshold=PICTURE_THRESHOLD,
    )
    numbers |= comparison.numbers
    if comparison.is_better:
        return CheckResult(
            "WARN",
            f"patches that start from pictures break {int(from_pictures.sum())} images that patches from noise do not, "
            f"another start at noise {int(from_noise.sum())}: gradients at noise mislead; report attacks "
            "with init=image",
            numbers,
        )
    return CheckResult(
        "pass", "patches that start from pictures break no more images than those that start from noise", numbers
    )


def _starts(context: AuditContext) -> Tensor:
    """Return for each image (n, C, h, w) the most misleading of some other images, shrunk to the size of a patch."""
    starts: list[Tensor] = []
    attacked = context.attacked
    mask = torch.ones(context.patch_size, dtype=torch.bool, device=attacked.images.device)
    draws = context.generator("pictures")
    for chunk in context.chunks(len(attacked.images)):
        goal = AttackGoal(attacked.labels[chunk], None, "margin")
        task = PatchTask(model=context.audited.logits, images=attacked.images[chunk], mask=mask, goal=goal)
        starts.append(start_patches("image", task, attacked.corners[chunk], generator=draws))
    return torch.cat(starts)
