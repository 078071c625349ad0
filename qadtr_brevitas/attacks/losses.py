"""What an attack descends: one number per image, from logits, smaller where the attack does better."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from qadtr_brevitas.core.errors import UsageError

AttackLoss: TypeAlias = Literal["logits", "cross-entropy", "margin"]


def attack_loss(loss: AttackLoss, logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """The loss an attack descends.

    | loss          | targeted                  | untargeted                |
    |---------------|---------------------------|---------------------------|
    | logits        | z_s - z_t                 | z_s - max of the others   |
    | cross-entropy | CE(t)                     | -CE(s)                    |
    | margin        | max of the others - z_t   | z_s - max of the others   |

    `logits` is LaVAN's (Karmon et al. 2018). It is taken on logits because on log-probabilities it is the same, the
    normalizer cancels, and on probabilities it saturates.

    Args:
        loss: which one.
        logits: (N, classes).
        labels: (N,) true classes s.
        targets: (N,) target classes t, or None for an untargeted attack.

    Returns:
        (N,), to be made small.
    """
    if loss == "cross-entropy":
        return (
            -F.cross_entropy(logits, labels, reduction="none") if targets is None else _cross_entropy(logits, targets)
        )
    if targets is None:
        return _own(logits, labels) - _best_other(logits, labels)
    rival = _own(logits, labels) if loss == "logits" else _best_other(logits, targets)
    return rival - _own(logits, targets)


def check_target(target: int, *, classes: int) -> None:
    """Refuses a target class that the model does not have.

    Raises:
        UsageError: it is not below `classes`.
    """
    if target >= classes:
        raise UsageError(f"target {target}: the model has {classes} classes, give 0..{classes - 1}")


def _cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    return F.cross_entropy(logits, classes, reduction="none")


def _own(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None]).squeeze(1)


def _best_other(logits: Tensor, classes: Tensor) -> Tensor:
    """The largest logit of any class but the given one."""
    return logits.scatter(1, classes[:, None], -torch.inf).amax(1)
