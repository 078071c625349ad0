"""G6, G13 and G17: patches and gradients of other networks, and the attack on the undefended twin."""

from __future__ import annotations

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import Model
from qadtr_brevitas.auditing.context import FEWEST_IMAGES, AuditContext, predictions
from qadtr_brevitas.auditing.finding import CheckResult, skipped
from qadtr_brevitas.auditing.significance import compare, rate

TWIN_ASR = 0.8
"""Success rate on the undefended twin below which the attack counts as too weak."""


def transfer(context: AuditContext) -> CheckResult:
    """Compare patches made elsewhere with patches made on the network itself."""
    if not context.broken_by_transfer:
        return skipped("needs a network with several precisions, --twin DIR, or other models to take patches from")
    comparison = compare(context.baseline, context.broken_by_transfer, base_name="white-box")
    if comparison.is_better:
        return CheckResult(
            "WARN",
            f"patches {comparison.best} break more images than patches made on the network itself, whose own "
            "gradients therefore mislead: report the transferred patches",
            comparison.numbers,
        )
    return CheckResult(
        "pass", "patches made elsewhere are no better than those made on the network itself", comparison.numbers
    )


def other_gradients(context: AuditContext) -> CheckResult:
    """Attack the outputs of the network with the gradients of another one (BPDA, Athalye et al. 2018)."""
    audited = context.audited
    sources = ({} if audited.full_precision is None else {"of 32 bit": audited.full_precision}) | {
        f"of {name}": model for name, model in audited.other_networks().items()
    }
    if not sources:
        return skipped("needs a network that can also run at 32 bit, --twin DIR, or other models to differentiate")
    broken = {
        f"gradient {name}": context.broken_with_gradients_of(with_gradients_of(audited.logits, source))
        for name, source in sources.items()
    }
    comparison = compare(context.baseline, broken, base_name="own gradient")
    if comparison.is_better:
        return CheckResult(
            "WARN",
            f"the {comparison.best} breaks more images than the network's own: its gradients are masked; report the "
            "attack with the other ones",
            comparison.numbers,
        )
    return CheckResult("pass", "no other network's gradients are better than its own", comparison.numbers)


def undefended_twin(context: AuditContext) -> CheckResult:
    """Run the longest attack on the same network without the defense, where it has to succeed."""
    twin = context.audited.twin
    if twin is None:
        return skipped("needs the same network without the defense: give --twin DIR")
    predicted = predictions(twin, context.attacked.images, batch_size=context.batch_size)
    right = (predicted == context.attacked.labels).nonzero().flatten()
    if len(right) < FEWEST_IMAGES:
        return skipped(f"the twin classifies only {len(right)} of the images correctly: give more images")
    steps = 4 * context.profile.steps
    attacked = context.attacked.subset(right)
    patches = context.search(twin, steps=steps, attacked=attacked, start=context.start()[right]).best[steps]
    predicted = predictions(twin, attacked.with_patches(patches), batch_size=context.batch_size)
    on_twin = rate(predicted != attacked.labels)
    numbers = {"asr on the twin": on_twin, "asr here": rate(context.broken_by_longest), "images": float(len(right))}
    if on_twin < TWIN_ASR:
        return CheckResult(
            "WARN",
            f"the same attack breaks only {on_twin:.1%} of the undefended twin: it is too weak to claim a defense with",
            numbers,
        )
    return CheckResult("pass", "the same attack breaks the undefended twin", numbers)


def with_gradients_of(forward: Model, backward: Model) -> Model:
    """Return the model with the outputs of one model and the gradients of another."""

    def logits(images: Tensor) -> Tensor:
        with torch.no_grad():
            value = forward(images)
        carrier = backward(images)
        return carrier + (value - carrier).detach()

    return logits
