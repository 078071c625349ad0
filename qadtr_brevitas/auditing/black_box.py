"""G5 and G7: attacks without gradients, which no masking of gradients can stop.

G3: larger patches must break more images, and the largest all of them.

G19: patches that begin as pictures, for networks that are blind to noise and have no gradients there.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import Model
from qadtr_brevitas.attacks.shapes import side_for_area
from qadtr_brevitas.attacks.per_image import PatchTask
from qadtr_brevitas.attacks.results import AttackGoal
from qadtr_brevitas.attacks.sparse_rs import RandomSearch
from qadtr_brevitas.attacks.starts import start_patches
from qadtr_brevitas.auditing.context import PATCH_SHARE, AuditContext
from qadtr_brevitas.auditing.finding import Verdict
from qadtr_brevitas.auditing.search import PatchedImages
from qadtr_brevitas.auditing.significance import Gain, compare, deviations, rate

BLACK_BOX_THRESHOLD = 0.002

CHANGED_SHARE = 0.4
"""The share of the patch that the first changes cover, as in the official code."""


def black_box(context: AuditContext) -> Verdict:
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


def noise_patches(context: AuditContext) -> Verdict:
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


def random_search(context: AuditContext, model: Model, scene: PatchedImages) -> Tensor:
    """Images (N, 3, H, W) with patches found by Sparse-RS's search (Croce et al. 2022), at the places of the scene.

    Patches that moved would be compared by their places with those of the white-box attack, not by their textures.
    """
    found: list[Tensor] = []
    for chunk in torch.arange(len(scene.images), device=scene.images.device).split(context.batch_size):
        part = scene.only(chunk)
        search = RandomSearch(
            task=PatchTask(
                model=model,
                images=part.images,
                mask=torch.ones(context.size, dtype=torch.bool, device=scene.images.device),
                goal=AttackGoal(part.labels, None, "margin"),
            ),
            draw_corners=lambda part=part: part.corners,
            allowed_corners=None,
            queries=context.profile.queries,
            alpha=CHANGED_SHARE,
            move_every=1,
            generator=context.generator("random search"),
        )
        found.append(search.run().images)
    return torch.cat(found)


SHARES = (1 / 64, 9 / 256, PATCH_SHARE, 9 / 64)
"""Shares of the pixels: sides of 4, 6, 8 and 12 on an image of 32x32."""

FULL_IMAGE_ASR = 0.99


def larger_patches(context: AuditContext) -> Verdict:
    """Success by the size of the patch, up to the whole image."""
    sides = dict.fromkeys(side_for_area(max(share, _one_pixel(context)), context.image_size) for share in SHARES)
    found = {f"{side}x{side}": _broken(context, (side, side)) for side in sides}
    found["whole image"] = _broken(context, context.image_size)
    numbers = {f"asr {name}": rate(broken) for name, broken in found.items()}
    names = list(found)
    falls = {
        f"{smaller} to {larger}": Gain.of(found[smaller], found[larger], comparisons=len(names) - 1)
        for smaller, larger in pairwise(names)
    }
    fall = max(falls, key=lambda name: falls[name].value - falls[name].noise)
    left = 1 - rate(found["whole image"])
    noise = deviations() * math.sqrt(FULL_IMAGE_ASR * (1 - FULL_IMAGE_ASR) / len(context))
    numbers |= {"largest fall": falls[fall].value, "noise of the fall": falls[fall].noise, "noise of the whole": noise}
    if left > 1 - FULL_IMAGE_ASR + noise:
        return Verdict(
            "WARN",
            f"{left:.1%} of the images stay right even where the attacker chooses every pixel: the attack fails, not "
            "the network is robust; look for masked gradients (G8, G12)",
            numbers,
        )
    if falls[fall].exceeds(0):
        return Verdict(
            "WARN", f"a larger patch breaks fewer images ({fall}): the attack does not find what is there", numbers
        )
    return Verdict("pass", "larger patches break more images, and the whole image all of them", numbers)


def _broken(context: AuditContext, size: tuple[int, int]) -> Tensor:
    """Images broken by patches of a size."""
    if size == context.size:
        return context.compared
    scene = PatchedImages(context.scene.images, context.scene.labels, context.corners(size))
    steps = context.profile.compared_steps
    trace = context.search(context.victim.logits, steps=steps, scene=scene, start=context.start(size=size))
    # Larger patches are no attack within the budget: they do not count for the worst case.
    return context.is_wrong(scene.put(trace.best[steps]), scene.labels).cpu()


def _one_pixel(context: AuditContext) -> float:
    return 1 / (context.image_size[0] * context.image_size[1])


PICTURE_THRESHOLD = 0.002

PICTURE_STEP = 0.03
"""Larger steps wipe a picture out before they make anything of it."""


def pictures(context: AuditContext) -> Verdict:
    """The white-box attack from pictures, on the images that it leaves from noise, against one more start at noise."""
    left = (~context.white_box).nonzero().flatten()
    numbers = {"images left by white-box": float(len(left))}
    if len(left) == 0:
        return Verdict("pass", "the white-box attacks leave no image to be broken otherwise", numbers)
    k, there = context.profile.steps, left.to(context.batch.device)
    scene = context.scene.only(there)
    patches = context.search(
        context.victim.logits, steps=k, scene=scene, start=_starts(context)[there], step_size=PICTURE_STEP
    ).best[k]
    begun = context.note(context.is_wrong(scene.put(patches), scene.labels), left)
    started = context.restarted(context.profile.restarts, left)
    comparison = compare(
        context.white_box | started,
        {"white-box and pictures": context.white_box | begun},
        base_name="white-box and another start",
        threshold=PICTURE_THRESHOLD,
    )
    numbers |= comparison.numbers
    if comparison.is_better:
        return Verdict(
            "WARN",
            f"patches that begin as pictures break {int(begun.sum())} images that patches from noise do not, another "
            f"start at noise {int(started.sum())}: gradients at noise mislead, report attacks with init=image",
            numbers,
        )
    return Verdict("pass", "patches that begin as pictures find no more than those that begin at noise", numbers)


def _starts(context: AuditContext) -> Tensor:
    """(n, 3, h, w) for each image the most misleading of some other images, made as small as a patch."""
    found: list[Tensor] = []
    images, labels, corners = context.scene.images, context.scene.labels, context.scene.corners
    mask = torch.ones(context.size, dtype=torch.bool, device=images.device)
    draw = context.generator("pictures")
    for chunk in torch.arange(len(images), device=images.device).split(context.batch_size):
        aim = AttackGoal(labels[chunk], None, "margin")
        scene = PatchTask(model=context.victim.logits, images=images[chunk], mask=mask, goal=aim)
        found.append(start_patches("image", scene, corners[chunk], generator=draw))
    return torch.cat(found)
