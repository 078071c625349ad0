"""G5 and G7: attacks without gradients, which masked gradients cannot stop."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import Model
from qadtr_brevitas.attacks.per_image import PatchTask
from qadtr_brevitas.attacks.results import AttackGoal
from qadtr_brevitas.attacks.sparse_rs import GeneratorDraws, RandomSearch
from qadtr_brevitas.auditing.context import AuditContext
from qadtr_brevitas.auditing.finding import CheckResult
from qadtr_brevitas.auditing.search import AttackedImages
from qadtr_brevitas.auditing.significance import compare, rate

BLACK_BOX_THRESHOLD = 0.002
"""Gain of the success rate that does not matter."""

CHANGED_SHARE = 0.4
"""The share of the patch that the first changes of Sparse-RS cover, as in the official code."""


def black_box(context: AuditContext) -> CheckResult:
    """Compare random search with one more start of the gradients, on the images that the white-box attacks leave.

    Any further attack breaks some more images; only those that another start does not break are a sign of masking.
    """
    white_box = context.broken_by_white_box
    left = (~white_box).nonzero().flatten()
    numbers = {"images left by white-box": float(len(left)), "queries": float(context.profile.queries)}
    if len(left) == 0:
        return CheckResult("pass", "the white-box attacks break every image", numbers)
    attacked = context.attacked.subset(left.to(context.images.device))
    images = random_search(context, context.audited.logits, attacked)
    searched = context.record_broken(context.is_wrong(images, attacked.labels), left)
    started = context.broken_by_restart(context.profile.restarts, left)
    comparison = compare(
        white_box | started,
        {"white-box and random search": white_box | searched},
        base_name="white-box and another start",
        threshold=BLACK_BOX_THRESHOLD,
    )
    numbers |= comparison.numbers
    if comparison.is_better:
        return CheckResult(
            "WARN",
            f"random search breaks {int(searched.sum())} images that gradients do not, another start of the "
            f"gradients {int(started.sum())}: the gradients are masked; report the worst case over both attacks",
            numbers,
        )
    return CheckResult("pass", "random search finds no more than gradients from another start", numbers)


def noise_patches(context: AuditContext) -> CheckResult:
    """Try patches of noise, many for each image, on the same places."""
    draws = math.ceil(context.profile.noise_patches / len(context))
    noise_draws, broken_by_any = context.generator("noise"), torch.zeros(len(context), dtype=torch.bool)
    single, white_box = 0.0, context.broken_by_white_box
    for _ in range(draws):
        noise = torch.rand(*context.images.shape[:2], *context.patch_size, generator=noise_draws)
        broken = context.broken_by(noise.to(context.images.device)[context.correct])
        single += rate(broken) / draws
        broken_by_any |= broken
    comparison = compare(
        white_box,
        {"with noise": white_box | broken_by_any},
        base_name="white-box",
        threshold=0.0,
    )
    numbers = {"asr one noise patch": single, f"asr any of {draws}": rate(broken_by_any), **comparison.numbers}
    if comparison.is_better:
        return CheckResult(
            "WARN",
            f"noise breaks {int((broken_by_any & ~white_box).sum())} images that the optimized patches do not: the "
            "white-box attack does not work",
            numbers,
        )
    return CheckResult("pass", "noise breaks hardly any image that the optimized patches do not", numbers)


def random_search(context: AuditContext, model: Model, attacked: AttackedImages) -> Tensor:
    """Return images (N, C, H, W) with patches found by the search of Sparse-RS (Croce et al. 2022).

    Patches stay at their places: if they moved, places would be compared with the white-box attack, not textures.
    """
    patched: list[Tensor] = []
    for chunk in context.chunks(len(attacked.images)):
        part = attacked.subset(chunk)
        search = RandomSearch(
            task=PatchTask(
                model=model,
                images=part.images,
                mask=torch.ones(context.patch_size, dtype=torch.bool, device=part.images.device),
                goal=AttackGoal(part.labels, None, "margin"),
            ),
            draw_corners=lambda part=part: part.corners,
            allowed_corners=None,
            queries=context.profile.queries,
            alpha=CHANGED_SHARE,
            move_every=1,
            draws=GeneratorDraws(context.generator("random search"), part.images.device),
        )
        patched.append(search.run().images)
    return torch.cat(patched)
