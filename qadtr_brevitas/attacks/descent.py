"""The loop of every gradient attack on patches: textures step against the gradient of a loss, inside their range.

An attack chooses the variables (one texture, one per image, or a texture and a shape), the loss, and a step rule for
each variable. What is kept, moved or recorded on the way belongs to the attack, which is called back.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

StepRuleName: TypeAlias = Literal["sgd", "sign", "adam"]

ApplyStep: TypeAlias = Callable[[Tensor, int], None]
"""Changes a variable in place, given its gradient and the number of the step, from 1."""


class StepRule(ABC):
    """How a variable follows its gradient."""

    @abstractmethod
    def bind(self, values: Tensor) -> ApplyStep:
        """Return the function that steps `values`; it keeps whatever the rule remembers of earlier gradients."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSteps(StepRule):
    """Steps of a torch optimizer.

    Args:
        steps: how many there will be.
        step_rule: `sgd` follows the raw gradient, `sign` its sign, `adam` is Adam.
        lr: step size at the start; of `sign`, in pixel values.
        cosine: let the step size fall to zero along a cosine.
    """

    steps: int
    step_rule: StepRuleName
    lr: float
    cosine: bool = False

    def bind(self, values: Tensor) -> ApplyStep:
        optimizer_class = torch.optim.Adam if self.step_rule == "adam" else torch.optim.SGD
        optimizer = optimizer_class([values], lr=self.lr)

        def apply(gradient: Tensor, step: int) -> None:
            # Assigned, never accumulated.
            values.grad = gradient.sign() if self.step_rule == "sign" else gradient
            for group in optimizer.param_groups:
                group["lr"] = self._step_size(step)
            optimizer.step()
            values.grad = None

        return apply

    def _step_size(self, step: int) -> float:
        if not self.cosine:
            return self.lr
        return self.lr * (1 + math.cos(math.pi * (step - 1) / self.steps)) / 2


def clip_to_pixels(values: Tensor) -> Tensor:
    """Return values clipped to [0, 1], the range of pixels."""
    return values.clamp(0, 1)


@dataclass(frozen=True)
class Variable:
    """Something to be optimized.

    Args:
        start: its first values, which are not changed.
        rule: how it follows its gradient.
        project: maps the values back into their range after each step.
    """

    start: Tensor
    rule: StepRule
    project: Callable[[Tensor], Tensor] = clip_to_pixels


def input_gradients(losses: Tensor, values: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the gradients of the sum of `losses` in each of `values`, and in nothing else."""
    return torch.autograd.grad(losses.sum(), values)


def descend(
    variables: Sequence[Variable],
    losses: Callable[..., Tensor],
    *,
    steps: int,
    differentiate: Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor]] = input_gradients,
    before_step: Callable[..., None] | None = None,
    after_step: Callable[..., None] | None = None,
) -> tuple[Tensor, ...]:
    """Step variables against the gradient of a loss.

    Callbacks are given the live values: they have to copy what they keep.

    Args:
        variables: what is optimized.
        losses: called with the values of each variable; returns the losses, of any shape, whose sum is to become small.
        steps: number of steps; 0 returns the starts.
        differentiate: computes the gradients of the sum of the losses in the values.
        before_step: called with the values of each variable when the gradients are known and the graph is freed.
        after_step: called with the number of steps done and the values of each variable.

    Returns:
        The values of each variable after the last step. Parameters of a model in `losses` receive no gradients.
    """
    values = [variable.start.detach().clone().requires_grad_() for variable in variables]
    apply_steps = [variable.rule.bind(value) for variable, value in zip(variables, values, strict=True)]
    for step in range(1, steps + 1):
        gradients = differentiate(losses(*values), values)
        if before_step is not None:
            before_step(*(value.detach() for value in values))
        with torch.no_grad():
            for variable, value, apply_step, gradient in zip(variables, values, apply_steps, gradients, strict=True):
                apply_step(gradient, step)
                value.copy_(variable.project(value))
        if after_step is not None:
            after_step(step, *(value.detach() for value in values))
    return tuple(value.detach() for value in values)
