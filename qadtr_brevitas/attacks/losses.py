"""The losses that attacks descend: one number per image, from logits, smaller where the attack does better."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from qadtr_brevitas.core.errors import UsageError

AttackLoss: TypeAlias = Literal["logits", "cross-entropy", "margin", "dlr"]


_SMALL_SPREAD = 1e-12


def attack_loss(loss: AttackLoss, logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """Return the loss that an attack descends.

    | loss          | targeted                  | untargeted                |
    |---------------|---------------------------|---------------------------|
    | logits        | z_s - z_t                 | z_s - max of the others   |
    | cross-entropy | CE(t)                     | -CE(s)                    |
    | margin        | max of the others - z_t   | z_s - max of the others   |
    | dlr           | (z_s - z_t) / spread      | margin / spread           |

    `dlr` is the difference of logits ratio (Croce & Hein 2020, "Reliable evaluation ..."), which no scale of the logits
    changes: the spread is the largest logit minus the third (targeted: minus the mean of the third and the fourth), or
    minus the smallest where there are fewer classes.

    `logits` is LaVAN's (Karmon et al. 2018). It uses logits: on log-probabilities it is the same, because the
    normalizer cancels, and on probabilities it saturates.

    Args:
        loss: name of the loss.
        logits: (N, classes).
        labels: (N,) true classes s.
        targets: (N,) target classes t, or None for an untargeted attack.

    Returns:
        (N,), to be minimized.
    """
    if loss == "cross-entropy":
        return (
            -F.cross_entropy(logits, labels, reduction="none") if targets is None else _cross_entropy(logits, targets)
        )
    if loss == "dlr":
        return _logits_ratio(logits, labels, targets)
    if targets is None:
        return _logit_of(logits, labels) - _largest_other_logit(logits, labels)
    rival = _logit_of(logits, labels) if loss == "logits" else _largest_other_logit(logits, targets)
    return rival - _logit_of(logits, targets)


def check_target(target: int, *, classes: int) -> None:
    """Raise if the model does not have a target class.

    Raises:
        UsageError: `target` is not below `classes`.
    """
    if target >= classes:
        raise UsageError(f"target class {target} is out of range: the model has classes 0 to {classes - 1}")


def _cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    return F.cross_entropy(logits, classes, reduction="none")


def _logits_ratio(logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    ranked = logits.sort(dim=1, descending=True).values
    third, fourth = (ranked[:, min(rank, ranked.shape[1] - 1)] for rank in (2, 3))
    true = _logit_of(logits, labels)
    if targets is None:
        difference, lower = true - _largest_other_logit(logits, labels), third
    else:
        difference, lower = true - _logit_of(logits, targets), (third + fourth) / 2
    # As in the official code; of equal logits the ratio is zero over this.
    return difference / (ranked[:, 0] - lower + _SMALL_SPREAD)


def _logit_of(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None]).squeeze(1)


def _largest_other_logit(logits: Tensor, classes: Tensor) -> Tensor:
    """Return the largest logit of any class but the given one."""
    return logits.scatter(1, classes[:, None], -torch.inf).amax(1)
