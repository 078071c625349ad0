"""G9, G10 and G11: are outputs random, and are they logits?"""

from __future__ import annotations

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import Model
from qadtr_brevitas.auditing.context import FORWARDS, RANDOM_ABOVE, AuditContext
from qadtr_brevitas.auditing.finding import CheckResult, skipped
from qadtr_brevitas.auditing.significance import compare

TOLERANCE = 1e-5
"""Distance of the sum of a row from 1 below which outputs count as probabilities."""

EOT_THRESHOLD = 0.01
"""Gain of the success rate that does not matter."""


def outputs_are_logits(context: AuditContext) -> CheckResult:
    """Look for rows that sum to 1 and stay in [0, 1] (as AutoAttack's check, Croce and Hein 2020)."""
    with torch.no_grad():
        outputs = context.audited.logits(context.images[: context.batch_size]).cpu().double()
    off = (outputs.sum(1) - 1).abs().max().nan_to_num().item()
    low, high = outputs.min().nan_to_num().item(), outputs.max().nan_to_num().item()
    numbers = {"largest distance of a sum from 1": off, "smallest output": low, "largest output": high}
    if off < TOLERANCE and low >= 0 and high <= 1:
        return CheckResult(
            "WARN",
            "the outputs are probabilities: losses on them saturate and their gradients vanish; give the logits",
            numbers,
        )
    return CheckResult("pass", "the outputs are logits, not probabilities", numbers)


def random_outputs(context: AuditContext) -> CheckResult:
    """Compare several forward passes on one batch (as AutoAttack's check, Croce and Hein 2020)."""
    numbers = {"difference of outputs": context.difference, "forwards": float(FORWARDS)}
    if context.is_random:
        return CheckResult(
            "WARN",
            f"the same images give different outputs each time (by more than {RANDOM_ABOVE:g}): attack the mean over "
            "many forward passes or over the precisions (EOT); a single gradient is noise",
            numbers,
        )
    return CheckResult("pass", "the same images give the same outputs", numbers)


def mean_over_precisions(context: AuditContext) -> CheckResult:
    """Attack the mean of all precisions' outputs, which broke EMPIR (Tramer et al. 2020, section 12)."""
    audited = context.audited
    if context.is_random:
        draws = context.profile.draws
        broken = context.broken_with_gradients_of(mean_of([audited.logits] * draws))
        comparison = compare(context.baseline, {f"mean of {draws} draws": broken}, base_name="one draw")
        return CheckResult(
            "WARN",
            "the network draws anew for each forward, so an attack without EOT says nothing about its robustness: "
            "report the attack on the mean of many draws",
            comparison.numbers,
        )
    if not audited.other_precisions:
        return skipped("needs a network with several precisions or with random outputs")
    broken = context.broken_with_gradients_of(mean_of([audited.logits, *audited.other_precisions.values()]))
    comparison = compare(
        context.baseline, {"mean over precisions": broken}, base_name="this precision", threshold=EOT_THRESHOLD
    )
    if comparison.is_better:
        return CheckResult(
            "WARN",
            "patches made on the mean over all precisions break more images than patches made at this one: report "
            "them (write the precisions as 8+4+2); the gradients at this precision mislead",
            comparison.numbers,
        )
    return CheckResult(
        "pass", "the mean over all precisions is no better source than this precision", comparison.numbers
    )


def mean_of(models: list[Model]) -> Model:
    """Return the model whose logits are the mean of those of several models."""

    def logits(images: Tensor) -> Tensor:
        return torch.stack([model(images) for model in models]).mean(0)

    return logits
