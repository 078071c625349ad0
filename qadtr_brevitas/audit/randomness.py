"""G9 and G10: networks that answer differently each time, and attacks on the mean of the answers (EOT)."""

from __future__ import annotations

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import Model
from qadtr_brevitas.audit.context import FORWARDS, RANDOM_ABOVE, Context
from qadtr_brevitas.audit.finding import Verdict, skipped
from qadtr_brevitas.audit.significance import compare

EOT_THRESHOLD = 0.01


def random_outputs(context: Context) -> Verdict:
    """Several forwards on one batch (as AutoAttack's check, Croce and Hein 2020)."""
    numbers = {"difference of outputs": context.difference, "forwards": float(FORWARDS)}
    if context.is_random:
        return Verdict(
            "WARN",
            f"the same images give other outputs each time (more than {RANDOM_ABOVE:g}): attack the mean over many "
            "forwards or over the precisions (EOT), one gradient at a time is noise",
            numbers,
        )
    return Verdict("pass", "the same images give the same outputs", numbers)


def mean_over_precisions(context: Context) -> Verdict:
    """The attack that broke EMPIR (Tramer et al. 2020, section 12): all precisions' outputs in one loss."""
    victim = context.victim
    if context.is_random:
        draws = context.profile.draws
        found = context.attack(mean_of([victim.logits] * draws))
        comparison = compare(context.compared, {f"mean of {draws} draws": found}, base_name="one draw")
        return Verdict(
            "WARN",
            "the network draws anew for each forward, so an attack without EOT says nothing of its robustness: report "
            "the attack on the mean of many draws",
            comparison.numbers,
        )
    if not victim.others:
        return skipped("needs a network with several precisions or with random outputs")
    found = context.attack(mean_of([victim.logits, *victim.others.values()]))
    comparison = compare(
        context.compared, {"mean over precisions": found}, base_name="this precision", threshold=EOT_THRESHOLD
    )
    if comparison.is_better:
        return Verdict(
            "WARN",
            "patches made on the mean over all precisions break more images than patches made at this one: report "
            "them (write the precisions as 8+4+2), the gradients at this precision mislead",
            comparison.numbers,
        )
    return Verdict("pass", "the mean over all precisions is no better source than this precision", comparison.numbers)


def mean_of(models: list[Model]) -> Model:
    """The mean of the logits of models."""

    def logits(images: Tensor) -> Tensor:
        return torch.stack([model(images) for model in models]).mean(0)

    return logits
