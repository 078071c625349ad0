"""How pixels follow a gradient: step rules, the step size over time, and the range that is never left."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

StepRule: TypeAlias = Literal["sgd", "sign", "adam"]


@dataclass(frozen=True, kw_only=True)
class Descent:
    """Steps of one rule.

    Args:
        steps: how many there will be.
        step_rule: `sgd` follows the raw gradient, `sign` its sign, `adam` Adam.
        lr: step size at the start; of `sign`, in pixel values.
        cosine: True to let the step size fall to zero along a cosine.
    """

    steps: int
    step_rule: StepRule
    lr: float
    cosine: bool

    def optimizer(self, values: Tensor) -> torch.optim.Optimizer:
        """What `move` needs to move `values`; Adam remembers earlier gradients in it."""
        if self.step_rule == "adam":
            return torch.optim.Adam([values], lr=self.lr)
        return torch.optim.SGD([values], lr=self.lr)

    def move(self, values: Tensor, gradient: Tensor, optimizer: torch.optim.Optimizer, *, step: int) -> None:
        """Moves `values` in place, against the gradient, and clips them to [0, 1].

        Args:
            values: what the optimizer was made for.
            gradient: of the same shape.
            optimizer: of these values.
            step: number of the step, from 1.
        """
        # Assigned, never accumulated.
        values.grad = gradient.sign() if self.step_rule == "sign" else gradient
        for group in optimizer.param_groups:
            group["lr"] = self._step_size(step)
        optimizer.step()
        with torch.no_grad():
            values.clamp_(0, 1)

    def _step_size(self, step: int) -> float:
        if not self.cosine:
            return self.lr
        return self.lr * (1 + math.cos(math.pi * (step - 1) / self.steps)) / 2
