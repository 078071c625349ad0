"""G20: an ensemble of patch searches, for the worst case."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qadtr_brevitas.attacks.image_streams import ImageStreams
from qadtr_brevitas.attacks.patch_auto import VERSIONS, Ensemble, Part
from qadtr_brevitas.attacks.per_image import PatchTask
from qadtr_brevitas.attacks.results import AttackGoal
from qadtr_brevitas.auditing.context import AuditContext
from qadtr_brevitas.auditing.finding import CheckResult
from qadtr_brevitas.auditing.search import AttackedImages
from qadtr_brevitas.auditing.significance import compare
from qadtr_brevitas.core.seeding import derive_seed

ENSEMBLE_THRESHOLD = 0.01
"""Gain of the success rate that does not matter."""


def ensemble(context: AuditContext) -> CheckResult:
    """Run the ensemble `patch-auto` on the images that the white-box attacks leave, at the same places.

    An attacker who chooses the place breaks more still: `evaluate --attack patch-auto`.
    """
    white_box = context.broken_by_white_box
    left = (~white_box).nonzero().flatten()
    numbers = {"images left by white-box": float(len(left))}
    if len(left) == 0:
        return CheckResult("pass", "the white-box attacks break every image", numbers)
    parts = VERSIONS[context.profile.ensemble]
    there = left.to(context.images.device)
    attacked = context.attacked.subset(there)
    found = [
        _ensemble(context, parts, attacked.subset(chunk), left[chunk.cpu()]) for chunk in context.chunks(len(left))
    ]
    images = torch.cat([ensemble.run().images for ensemble in found])
    searched = context.record_broken(context.is_wrong(images, attacked.labels), left)
    started = context.broken_by_restart(context.profile.restarts, left)
    comparison = compare(
        white_box | started,
        {"white-box and ensemble": white_box | searched},
        base_name="white-box and another start",
        threshold=ENSEMBLE_THRESHOLD,
    )
    numbers |= comparison.numbers
    if comparison.is_better:
        return CheckResult(
            "WARN",
            f"the ensemble patch-auto breaks {int(searched.sum())} images that the white-box attacks do not, another "
            f"start {int(started.sum())}: one search by gradient is too weak here, report the ensemble "
            "(--attack patch-auto)",
            numbers,
        )
    return CheckResult("pass", "an ensemble of searches breaks no more images than one more start", numbers)


def _ensemble(context: AuditContext, parts: Sequence[Part], attacked: AttackedImages, indices: Tensor) -> Ensemble:
    """Return the searches for some images, given their numbers among those that are classified correctly."""
    mask = torch.ones(context.patch_size, dtype=torch.bool, device=attacked.images.device)
    goal = AttackGoal(attacked.labels, None, "margin")
    seed = derive_seed(context.seed, "audit", "ensemble")
    return Ensemble(
        parts=parts,
        task=PatchTask(model=context.audited.logits, images=attacked.images, mask=mask, goal=goal),
        places=attacked.corners,
        moves=False,
        streams=ImageStreams.of(seed, indices.tolist(), device=attacked.images.device),
        pictures=(context.images, context.labels),
    )
