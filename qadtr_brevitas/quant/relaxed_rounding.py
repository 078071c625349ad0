"""Rounding that is learned: each weight lies between two levels, and is driven to one of them (Nagel et al. 2020).

A weight is `lower` + h(v) in steps, with h the rectified sigmoid: a sigmoid that is stretched and clipped, so that it
reaches 0 and 1. The regularizer sum of 1 - |2 h - 1|^beta lets h move freely at first, while beta is large, and drives
it to 0 or 1 in the end. Source: AdaRound, https://arxiv.org/abs/2004.10568, section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qadtr_brevitas.quant.quantizer import Levels

# The sigmoid is stretched to this range.
_LOW, _HIGH = -0.1, 1.1
# A weight that begins at an end of its range could hardly leave it.
_MARGIN = 0.01
# The exponent of the regularizer falls from the first to the last value.
_BETAS = (20.0, 2.0)
# The share of the steps without a regularizer.
FREE = 0.2


class RelaxedLevels:
    """The levels of some weights while their rounding is learned.

    Args:
        wanted: the weights in steps, of any shape.
        start: the levels at the start, whole numbers. Where they are not the nearest ones, the weight begins half way
            between where it is and where they are.
        levels: the lowest and the highest level.
    """

    def __init__(self, wanted: Tensor, start: Tensor, levels: Levels) -> None:
        wanted = wanted.clamp(*levels)
        # One of the two levels is that of the start.
        self.lower = torch.where(wanted >= start, start, start - 1).clamp(levels[0], levels[1] - 1)
        share, begun = (wanted - self.lower).clamp(0, 1), start - self.lower
        is_nearest = (wanted - start).abs() <= 0.5
        share = torch.where(is_nearest, share, (share + begun) / 2).clamp(_MARGIN, 1 - _MARGIN)
        stretched = (share - _LOW) / (_HIGH - _LOW)
        self.v = (stretched / (1 - stretched)).log().requires_grad_()

    def share(self) -> Tensor:
        """Return h: how far each weight is from the lower to the upper level, in [0, 1]."""
        return rectified_sigmoid(self.v)

    def relaxed(self) -> Tensor:
        """Return the weights in steps, between levels."""
        return self.lower + self.share()

    def rounded(self) -> Tensor:
        """Return the level that each weight is nearer to, a whole number."""
        return self.lower + (self.share().detach() >= 0.5)


def rectified_sigmoid(v: Tensor) -> Tensor:
    """Return the stretched and clipped sigmoid, in [0, 1]."""
    return (v.sigmoid() * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def distance_from_levels(share: Tensor, beta: float) -> Tensor:
    """Return the sum of 1 - |2 h - 1|^beta: 0 where every weight is on a level."""
    return (1 - (2 * share - 1).abs().pow(beta)).sum()


def exponent_at(step: int, steps: int) -> float | None:
    """Return the exponent of the regularizer at a step, which falls linearly; None while there is no regularizer."""
    progress = (step / steps - FREE) / (1 - FREE)
    return None if progress < 0 else _BETAS[0] + (_BETAS[1] - _BETAS[0]) * progress
