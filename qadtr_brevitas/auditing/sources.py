"""G6, G13 and G17: gradients and patches of other networks, and the network without the defense.

G18: whether a part of a defense helps against attacks without gradients too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import Model
from qadtr_brevitas.auditing.black_box import random_search
from qadtr_brevitas.auditing.context import AuditContext
from qadtr_brevitas.auditing.finding import Verdict, skipped
from qadtr_brevitas.auditing.significance import Gain, compare, rate

TWIN_ASR = 0.8
FEWEST_IMAGES = 20
"""Fewer images than this tell nothing: half of them could change without being more than noise."""


def transfer(context: AuditContext) -> Verdict:
    """Patches made elsewhere against patches made on the network itself."""
    if not context.transfers:
        return skipped("needs a network with several precisions, --twin DIR, or other models to take patches from")
    comparison = compare(context.compared, context.transfers, base_name="white-box")
    if comparison.is_better:
        return Verdict(
            "WARN",
            f"patches {comparison.best} break more images than patches made on the network itself, whose own "
            "gradients therefore mislead: report the transferred patches",
            comparison.numbers,
        )
    return Verdict(
        "pass", "patches made elsewhere are no better than those made on the network itself", comparison.numbers
    )


def other_gradients(context: AuditContext) -> Verdict:
    """The outputs of the network with the gradients of another one (BPDA, Athalye et al. 2018)."""
    victim = context.victim
    backs = ({} if victim.full is None else {"of 32 bit": victim.full}) | {
        f"of {name}": model for name, model in victim.sources().items()
    }
    if not backs:
        return skipped("needs a network that can also run at 32 bit, --twin DIR, or other models to differentiate")
    found = {f"gradient {name}": context.attack(forward_backward(victim.logits, back)) for name, back in backs.items()}
    comparison = compare(context.compared, found, base_name="own gradient")
    if comparison.is_better:
        return Verdict(
            "WARN",
            f"the {comparison.best} breaks more images than the network's own: its gradients are masked, report the "
            "attack with the other ones",
            comparison.numbers,
        )
    return Verdict("pass", "no other network's gradients are better than its own", comparison.numbers)


def undefended_twin(context: AuditContext) -> Verdict:
    """The longest attack on the same network without the defense: it must succeed, or it proves nothing."""
    twin = context.victim.twin
    if twin is None:
        return skipped("needs the same network without the defense: give --twin DIR")
    with torch.no_grad():
        predictions = torch.cat([twin(batch) for batch in context.scene.images.split(context.batch_size)]).argmax(1)
    right = (predictions == context.scene.labels).nonzero().flatten()
    if len(right) < FEWEST_IMAGES:
        return skipped(f"the twin classifies only {len(right)} of the images correctly: give more images")
    steps = 4 * context.profile.steps
    scene = context.scene.only(right)
    patches = context.search(twin, steps=steps, scene=scene, start=context.start()[right]).best[steps]
    on_twin = rate(_wrong(twin, scene.put(patches), scene.labels, context.batch_size))
    numbers = {"asr on the twin": on_twin, "asr here": rate(context.longest_breaks), "images": float(len(right))}
    if on_twin < TWIN_ASR:
        return Verdict(
            "WARN",
            f"the same attack breaks only {on_twin:.1%} of the undefended twin: it is too weak to claim a defense with",
            numbers,
        )
    return Verdict("pass", "the same attack breaks the undefended twin", numbers)


def forward_backward(forward: Model, backward: Model) -> Model:
    """The outputs of one model with the gradients of another."""

    def logits(images: Tensor) -> Tensor:
        with torch.no_grad():
            value = forward(images)
        carrier = backward(images)
        return carrier + (value - carrier).detach()

    return logits


def _wrong(model: Model, images: Tensor, labels: Tensor, batch_size: int) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(batch).argmax(1) for batch in images.split(batch_size)]) != labels


HELP_THRESHOLD = 0.01

WEAKEST_BLACK_BOX = 0.05
"""Where random search breaks less of the network without the part, it cannot show what the part is good for."""


def ablated(context: AuditContext) -> Verdict:
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


def _white_box(context: AuditContext, model: Model, index: Tensor) -> Tensor:
    scene, steps = context.scene.only(index), context.profile.compared_steps
    patches = context.search(model, steps=steps, scene=scene, start=context.start()[index]).best[steps]
    return (_predict(context, model, scene.put(patches)) != scene.labels).cpu()


def _black_box(context: AuditContext, model: Model, index: Tensor) -> Tensor:
    scene = context.scene.only(index)
    return (_predict(context, model, random_search(context, model, scene)) != scene.labels).cpu()


def _predict(context: AuditContext, model: Model, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(batch).argmax(1) for batch in images.split(context.batch_size)])
