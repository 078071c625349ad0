"""The state of a model while an attack looks for patches."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, runtime_checkable

from torch import nn

from qadtr_brevitas.attacks.base import Model


@runtime_checkable
class FreezesWeights(Protocol):
    """A model that is faster while its weights do not change."""

    def frozen_weights(self) -> AbstractContextManager[None]:
        """Hold the weights still, without gradients, for the duration of a block."""
        ...


@contextmanager
def under_attack(model: Model) -> Generator[None]:
    """Put a module in evaluation mode with frozen weights for the duration of a block; leave functions as they are."""
    if not isinstance(model, nn.Module):
        yield
        return
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with model.frozen_weights() if isinstance(model, FreezesWeights) else nullcontext():
            yield
    finally:
        for module, training in was_training.items():
            module.training = training
