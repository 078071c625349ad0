"""G18: whether a part of a defense helps against attacks without gradients too."""

from __future__ import annotations

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import Model
from qadtr_brevitas.audit.black_box import random_search
from qadtr_brevitas.audit.context import Context
from qadtr_brevitas.audit.finding import Verdict, skipped
from qadtr_brevitas.audit.significance import Gain, rate
from qadtr_brevitas.audit.sources import FEWEST_IMAGES

HELP_THRESHOLD = 0.01

WEAKEST_BLACK_BOX = 0.05
"""Where random search breaks less of the network without the part, it cannot show what the part is good for."""


def ablated(context: Context) -> Verdict:
    """By how much each part lowers the success of white-box and of black-box patches."""
    if not context.victim.ablations:
        return skipped("needs the network trained without a part of the defense: give --ablation DIR for each part")
    numbers: dict[str, float] = {}
    suspicious: list[str] = []
    untold: list[str] = []
    for name, model in context.victim.ablations.items():
        right = (_predict(context, model, context.scene.images) == context.scene.labels).nonzero().flatten()
        if len(right) < FEWEST_IMAGES:
            return skipped(f"{name} classifies only {len(right)} of the images correctly: give more images")
        white = Gain.of(_white_box(context, model, right), context.compared[right.cpu()])
        with_part, without = (_black_box(context, net, right) for net in (context.victim.logits, model))
        black = Gain.of(without, with_part)
        numbers |= {
            f"white-box gain without, {name}": white.value,
            f"noise white-box, {name}": white.noise,
            f"black-box gain without, {name}": black.value,
            f"noise black-box, {name}": black.noise,
            f"asr black-box, {name}": rate(without),
        }
        if white.exceeds(HELP_THRESHOLD) and black.value <= HELP_THRESHOLD:
            (suspicious if rate(without) >= WEAKEST_BLACK_BOX else untold).append(name)
    if suspicious:
        return Verdict(
            "WARN",
            f"what {', '.join(suspicious)} lacks helps against gradients but not against random search: it hides "
            "gradients rather than making the network robust",
            numbers,
        )
    if untold:
        reason = f"random search breaks too little of {', '.join(untold)} to compare it: take --audit-profile full"
        return Verdict("skipped", reason, numbers)
    return Verdict("pass", "no part of the defense helps against gradients alone", numbers)


def _white_box(context: Context, model: Model, index: Tensor) -> Tensor:
    scene, steps = context.scene.only(index), context.profile.compared_steps
    patches = context.search(model, steps=steps, scene=scene, start=context.start()[index]).best[steps]
    return (_predict(context, model, scene.put(patches)) != scene.labels).cpu()


def _black_box(context: Context, model: Model, index: Tensor) -> Tensor:
    scene = context.scene.only(index)
    return (_predict(context, model, random_search(context, model, scene)) != scene.labels).cpu()


def _predict(context: Context, model: Model, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(batch).argmax(1) for batch in images.split(context.batch_size)])
