"""G11: whether a network gives logits."""

from __future__ import annotations

import torch

from qadtr_brevitas.audit.context import Context
from qadtr_brevitas.audit.finding import Verdict

TOLERANCE = 1e-5


def outputs_are_logits(context: Context) -> Verdict:
    """Rows that sum to 1 and stay in [0, 1] are probabilities (as AutoAttack's check, Croce and Hein 2020)."""
    with torch.no_grad():
        outputs = context.victim.logits(context.batch[: context.batch_size]).cpu().double()
    off = (outputs.sum(1) - 1).abs().max().nan_to_num().item()
    low, high = outputs.min().nan_to_num().item(), outputs.max().nan_to_num().item()
    numbers = {"largest distance of a sum from 1": off, "smallest output": low, "largest output": high}
    if off < TOLERANCE and low >= 0 and high <= 1:
        return Verdict(
            "WARN",
            "the outputs are probabilities: losses on them saturate and their gradients vanish, give the logits",
            numbers,
        )
    return Verdict("pass", "the outputs are logits, not probabilities", numbers)
