"""G19: patches that begin as pictures, for networks that are blind to noise and have no gradients there."""

from __future__ import annotations

import torch
from torch import Tensor

from qadtr_brevitas.attacks.per_image import Aim
from qadtr_brevitas.attacks.per_image import Scene as SearchScene
from qadtr_brevitas.attacks.starts import start_patches
from qadtr_brevitas.audit.context import Context
from qadtr_brevitas.audit.finding import Verdict
from qadtr_brevitas.audit.significance import compare

PICTURE_THRESHOLD = 0.002

PICTURE_STEP = 0.03
"""Larger steps wipe a picture out before they make anything of it."""


def pictures(context: Context) -> Verdict:
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


def _starts(context: Context) -> Tensor:
    """(n, 3, h, w) for each image the most misleading of some other images, made as small as a patch."""
    found: list[Tensor] = []
    images, labels, corners = context.scene.images, context.scene.labels, context.scene.corners
    mask = torch.ones(context.size, dtype=torch.bool, device=images.device)
    draw = context.generator("pictures")
    for chunk in torch.arange(len(images), device=images.device).split(context.batch_size):
        aim = Aim(labels[chunk], None, "margin")
        scene = SearchScene(model=context.victim.logits, images=images[chunk], mask=mask, aim=aim)
        found.append(start_patches("image", scene, corners[chunk], generator=draw))
    return torch.cat(found)
