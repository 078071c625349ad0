"""G18: does a part of a defense help against attacks without gradients too?"""

from __future__ import annotations

from torch import Tensor

from qadtr_brevitas.attacks.base import Model
from qadtr_brevitas.auditing.black_box_checks import random_search
from qadtr_brevitas.auditing.context import FEWEST_IMAGES, AuditContext, predictions
from qadtr_brevitas.auditing.finding import CheckResult, skipped
from qadtr_brevitas.auditing.significance import AsrGain, rate

HELP_THRESHOLD = 0.01
"""Fall of a success rate from which a part counts as a help."""

WEAKEST_BLACK_BOX = 0.05
"""Where random search breaks less of the network without the part, it cannot show what the part achieves."""


def ablated(context: AuditContext) -> CheckResult:
    """Measure by how much each part of the defense lowers the success of white-box and of black-box patches."""
    if not context.audited.ablations:
        return skipped("needs the network trained without a part of the defense: give --ablation DIR for each part")
    numbers: dict[str, float] = {}
    suspicious: list[str] = []
    undecided: list[str] = []
    for name, model in context.audited.ablations.items():
        right = (_predicted(context, model, context.attacked.images) == context.attacked.labels).nonzero().flatten()
        if len(right) < FEWEST_IMAGES:
            return skipped(f"{name} classifies only {len(right)} of the images correctly: give more images")
        white = AsrGain.of(_white_box(context, model, right), context.baseline[right.cpu()])
        with_part, without = (_black_box(context, net, right) for net in (context.audited.logits, model))
        black = AsrGain.of(without, with_part)
        numbers |= {
            f"white-box gain without, {name}": white.value,
            f"noise white-box, {name}": white.noise,
            f"black-box gain without, {name}": black.value,
            f"noise black-box, {name}": black.noise,
            f"asr black-box, {name}": rate(without),
        }
        if white.exceeds(HELP_THRESHOLD) and black.value <= HELP_THRESHOLD:
            (suspicious if rate(without) >= WEAKEST_BLACK_BOX else undecided).append(name)
    if suspicious:
        return CheckResult(
            "WARN",
            f"what {', '.join(suspicious)} lacks helps against gradients but not against random search: it hides "
            "gradients rather than making the network robust",
            numbers,
        )
    if undecided:
        reason = f"random search breaks too little of {', '.join(undecided)} to compare it: give --audit-profile full"
        return CheckResult("skipped", reason, numbers)
    return CheckResult("pass", "no part of the defense helps against gradients alone", numbers)


def _white_box(context: AuditContext, model: Model, index: Tensor) -> Tensor:
    attacked, steps = context.attacked.subset(index), context.profile.compared_steps
    patches = context.search(model, steps=steps, attacked=attacked, start=context.start()[index]).best[steps]
    return (_predicted(context, model, attacked.with_patches(patches)) != attacked.labels).cpu()


def _black_box(context: AuditContext, model: Model, index: Tensor) -> Tensor:
    attacked = context.attacked.subset(index)
    return (_predicted(context, model, random_search(context, model, attacked)) != attacked.labels).cpu()


def _predicted(context: AuditContext, model: Model, images: Tensor) -> Tensor:
    return predictions(model, images, batch_size=context.batch_size)
