"""G5 and G7: attacks without gradients, which no masking of gradients can stop."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import Model
from qadtr_brevitas.attacks.per_image import Aim
from qadtr_brevitas.attacks.per_image import Scene as SearchScene
from qadtr_brevitas.attacks.random_search import RandomSearch
from qadtr_brevitas.audit.context import Context
from qadtr_brevitas.audit.finding import Verdict
from qadtr_brevitas.audit.patch_search import Scene
from qadtr_brevitas.audit.significance import compare, rate

BLACK_BOX_THRESHOLD = 0.002

CHANGED_SHARE = 0.4
"""The share of the patch that the first changes cover, as in the official code."""


def black_box(context: Context) -> Verdict:
    """Random search on the images that the white-box attacks leave, against one more start of theirs.

    Any further attack breaks some more images; only what gradients from another start do not find speaks of masking.
    """
    left = (~context.white_box).nonzero().flatten()
    numbers = {"images left by white-box": float(len(left)), "queries": float(context.profile.queries)}
    if len(left) == 0:
        return Verdict("pass", "the white-box attacks leave no image to be broken otherwise", numbers)
    scene = context.scene.only(left.to(context.batch.device))
    images = random_search(context, context.victim.logits, scene)
    searched = context.note(context.is_wrong(images, scene.labels), left)
    started = context.restarted(context.profile.restarts, left)
    comparison = compare(
        context.white_box | started,
        {"white-box and random search": context.white_box | searched},
        base_name="white-box and another start",
        threshold=BLACK_BOX_THRESHOLD,
    )
    numbers |= comparison.numbers
    if comparison.is_better:
        return Verdict(
            "WARN",
            f"random search breaks {int(searched.sum())} images that gradients do not, another start of the "
            f"gradients {int(started.sum())}: the gradients are masked, report the worst case over both attacks",
            numbers,
        )
    return Verdict("pass", "random search finds no more than gradients from another start", numbers)


def noise_patches(context: Context) -> Verdict:
    """Patches of noise, many for each image, on the same places."""
    draws = math.ceil(context.profile.noise_patches / len(context))
    draw, found = context.generator("noise"), torch.zeros(len(context), dtype=torch.bool)
    single = 0.0
    for _ in range(draws):
        noise = torch.rand(len(context.batch), 3, *context.size, generator=draw).to(context.batch.device)
        broken = context.judge(noise[context.correct])
        single += rate(broken) / draws
        found |= broken
    comparison = compare(
        context.white_box, {"with noise": context.white_box | found}, base_name="white-box", threshold=0.0
    )
    numbers = {"asr one noise patch": single, f"asr any of {draws}": rate(found), **comparison.numbers}
    if comparison.is_better:
        return Verdict(
            "WARN",
            f"noise breaks {int((found & ~context.white_box).sum())} images that the optimized patches do not: the "
            "white-box attack does not work",
            numbers,
        )
    return Verdict("pass", "noise breaks hardly anything that the optimized patches do not", numbers)


def random_search(context: Context, model: Model, scene: Scene) -> Tensor:
    """Images (N, 3, H, W) with patches found by Sparse-RS's search (Croce et al. 2022), at the places of the scene.

    Patches that moved would be compared by their places with those of the white-box attack, not by their textures.
    """
    found: list[Tensor] = []
    for chunk in torch.arange(len(scene.images), device=scene.images.device).split(context.batch_size):
        part = scene.only(chunk)
        search = RandomSearch(
            scene=SearchScene(
                model=model,
                images=part.images,
                mask=torch.ones(context.size, dtype=torch.bool, device=scene.images.device),
                aim=Aim(part.labels, None, "margin"),
            ),
            draw_corners=lambda part=part: part.corners,
            ground=None,
            queries=context.profile.queries,
            alpha=CHANGED_SHARE,
            move_every=1,
            generator=context.generator("random search"),
        )
        found.append(search.run().images)
    return torch.cat(found)
