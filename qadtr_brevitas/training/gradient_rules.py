"""The contract of gradient rules."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from qadtr_brevitas.core.precision import Precision


class GradientRuleOptimizer(torch.optim.Optimizer):
    """An optimizer whose `step` sees changed gradients."""

    def set_context(self, *, step: int, precision: Precision | None) -> None:
        """Note which step comes next, and at which precision its gradient was taken (None: not known)."""

    def metrics(self) -> dict[str, float]:
        """Return figures of the last step, by name; they are logged and shown."""
        return {}


class GradientRule(ABC):
    """A gradient rule plug-in: changes gradients just before the optimizer uses them."""

    @property
    def precisions(self) -> tuple[Precision, ...] | None:
        """The precisions it changes gradients at; None for every one."""
        return None

    @abstractmethod
    def wrap(self, optimizer: torch.optim.Optimizer, *, seed: int) -> GradientRuleOptimizer:
        """Wrap an optimizer, so that its steps see changed gradients; the optimizer itself stays as it is."""
