"""The losses that patches of an audit descend, and the margin that ranks patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from qadtr_brevitas.attacks.losses import attack_loss

LogitLoss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Logits (N, classes) and classes (N,), the true ones unless stated otherwise, to losses (N,) to be minimized."""

DLR_CLASSES = 3
"""The classes that the difference of logits ratio needs at least."""

# As AutoAttack adds it, for outputs that are all alike.
_SMALLEST = 1e-12


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return minus the cross-entropy of the true class."""
    return attack_loss("cross-entropy", logits, labels)


def scaled_cross_entropy(factor: float) -> LogitLoss:
    """Return the cross-entropy of logits times a factor, which changes no prediction (Gupta and Ajanthan 2020)."""
    return lambda logits, labels: attack_loss("cross-entropy", factor * logits, labels)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the true logit minus the largest other one, negative where the prediction is wrong."""
    return attack_loss("margin", logits, labels)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the difference of logits ratio (Croce and Hein 2020, eq. 6): the margin by the first minus third logit."""
    top = logits.topk(DLR_CLASSES, dim=1).values
    return margin(logits, labels) / (top[:, 0] - top[:, DLR_CLASSES - 1]).clamp_min(_SMALLEST)


def targeted_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of target classes (N,), to be predicted instead of the true ones."""
    return attack_loss("cross-entropy", logits, targets, targets)
