"""G20, G22: an ensemble of patch searches, at the places of the other checks and at places of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qadtr_brevitas.attacks.image_streams import ImageStreams
from qadtr_brevitas.attacks.patch_auto import VERSIONS, Ensemble, Part
from qadtr_brevitas.attacks.per_image import PatchTask
from qadtr_brevitas.attacks.relocation import AllowedCorners
from qadtr_brevitas.attacks.results import AttackGoal
from qadtr_brevitas.auditing.context import AuditContext
from qadtr_brevitas.auditing.finding import CheckResult
from qadtr_brevitas.auditing.significance import compare, rate
from qadtr_brevitas.core.seeding import derive_seed

ENSEMBLE_THRESHOLD = 0.01
"""Gain of the success rate that does not matter."""

MOST = 0.5
"""Share of broken images above which a network is taken for one that does not resist."""


def ensemble(context: AuditContext) -> CheckResult:
    """Run the ensemble `patch-auto` on the images that the white-box attacks leave, at the same places."""
    white_box = context.broken_by_white_box
    left = (~white_box).nonzero().flatten()
    numbers = {"images left by white-box": float(len(left))}
    if len(left) == 0:
        return CheckResult("pass", "the white-box attacks break every image", numbers)
    searched = _broken_by_ensemble(context, left, moves=False)
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


def chosen_places(context: AuditContext) -> CheckResult:
    """Run `patch-auto` where it chooses the places, on the images that all other checks leave at random places.

    The other checks compare attacks at the same places, and who prints a patch also chooses where it lies. More images
    break at chosen places on any network, and they all count for the worst case. The check warns where that turns
    the verdict: most images resist at random places, and most do not at chosen ones.
    """
    at_random = context.broken_by_any
    left = (~at_random).nonzero().flatten()
    numbers = {"images left at random places": float(len(left))}
    if len(left) == 0:
        return CheckResult("pass", "patches at random places break every image", numbers)
    chosen = at_random | _broken_by_ensemble(context, left, moves=True)
    comparison = compare(at_random, {"chosen places": chosen}, base_name="random places, all checks")
    numbers |= comparison.numbers
    if comparison.is_better and rate(at_random) < MOST < rate(chosen):
        return CheckResult(
            "WARN",
            f"patches break {rate(chosen):.1%} of the images where the attacker chooses the place, and "
            f"{rate(at_random):.1%} at random places: figures at random places mislead here, report patch-auto "
            "(--attack patch-auto)",
            numbers,
        )
    return CheckResult("pass", "places of the attacker's choice do not turn the verdict", numbers)


def _broken_by_ensemble(context: AuditContext, left: Tensor, *, moves: bool) -> Tensor:
    """Return the images (n,) that the ensemble breaks of those numbered in `left`, and record them.

    Args:
        context: the audit.
        left: (m,) numbers of images among those that are classified correctly.
        moves: whether the ensemble chooses the places; else patches stay at those of the audit.
    """
    parts = VERSIONS[context.profile.ensemble]
    found = [_ensemble(context, parts, left[chunk.cpu()], moves=moves).run() for chunk in context.chunks(len(left))]
    labels = context.attacked.labels[left.to(context.images.device)]
    return context.record_broken(context.is_wrong(torch.cat([result.images for result in found]), labels), left)


def _ensemble(context: AuditContext, parts: Sequence[Part], indices: Tensor, *, moves: bool) -> Ensemble:
    attacked = context.attacked.subset(indices.to(context.images.device))
    mask = torch.ones(context.patch_size, dtype=torch.bool, device=attacked.images.device)
    goal = AttackGoal(attacked.labels, None, "margin")
    seed = derive_seed(context.seed, "audit", "ensemble")
    return Ensemble(
        parts=parts,
        task=PatchTask(model=context.audited.logits, images=attacked.images, mask=mask, goal=goal),
        places=AllowedCorners.outside(None, context.image_size, context.patch_size) if moves else attacked.corners,
        moves=moves,
        streams=ImageStreams.of(seed, indices.tolist(), device=attacked.images.device),
        pictures=(context.images, context.labels),
    )
