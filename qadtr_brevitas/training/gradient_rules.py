"""The contract of gradient rules: plug-ins that change gradients just before the optimizer uses them."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from qadtr_brevitas.core.precision import Precision


class GradientRuleOptimizer(torch.optim.Optimizer):
    """An optimizer whose `step` sees changed gradients."""

    def set_context(self, *, step: int, precision: Precision | None) -> None:
        """Set the number of the next step and the precision of its gradient; call it before each step.

        Args:
            step: 0-based count of optimizer steps since the run began; what is drawn depends on it and the seed only.
            precision: the precision that the gradient was computed at, the lowest of several; None if it is not known.
        """

    def metrics(self) -> dict[str, float]:
        """Return figures of the last step by name; they are logged, shown and averaged over the epoch."""
        return {}


class GradientRule(ABC):
    """A gradient rule plug-in."""

    @property
    def precisions(self) -> tuple[Precision, ...] | None:
        """The precisions that it is limited to, each of which training must draw; None for no limit."""
        return None

    @abstractmethod
    def wrap(self, optimizer: torch.optim.Optimizer, *, seed: int) -> GradientRuleOptimizer:
        """Return a wrapper of an optimizer whose steps see changed gradients.

        Parameter groups, state and learning rate schedulers are those of the wrapped optimizer. With equal gradients,
        all processes of a run take equal steps.

        Args:
            optimizer: the optimizer to wrap.
            seed: the recipe's seed.
        """
