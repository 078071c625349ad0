"""The contract of PTQ methods: what improves the precisions below 32 after the ranges are set, without labels.

`calibrate()` runs a list of them, in order. 32 bit stays the float network, bit for bit: what a method finds is kept in
modules of its own (`PtqState`), which act below 32 bit only. Float weights stay as they are, but for factors that are
powers of two and cancel each other (`PtqRun.rewrite`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from qadtr_brevitas.core.plugin import plugin
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.quant.switch import allowed_precisions

CHANGES_SHARED_WEIGHTS = (
    "Brevitas's GPTQ, GPFQ, Qronos and MagR change the weights that all precisions share: call "
    "calibrate(model, images, weights=['gptq']), which keeps levels per precision, or call them on "
    "freeze(model, precision)"
)


class PtqRun(ABC):
    """One run of a PTQ method on one model, with what it remembers between its passes over the images."""

    passes: int = 0
    """Passes over all batches that `rewrite`, `aiming` and `improve` make, for the progress; they count each batch."""

    def rewrite(self, batches: Iterable[Tensor], count_batch: Callable[[], object]) -> None:
        """Change the float network, in place, to one that computes the same, bit for bit; by default, do nothing.

        This runs before the ranges are measured, and before any `watching_float`. `PtqState.reset` undoes it.

        Args:
            batches: as in `improve`.
            count_batch: likewise.
        """
        return

    def aiming(self, batches: Iterable[Tensor], count_batch: Callable[[], object]) -> AbstractContextManager[object]:
        """Return a context in which the rest of the calibration runs, for other weights than the float ones.

        It begins after all `rewrite` and before the ranges are set. A method may set `WeightRounding.wanted` inside:
        the weights that get ranges and that levels are to come near to. By default nothing is set.

        Args:
            batches: as in `improve`.
            count_batch: likewise.
        """
        return nullcontext()

    def watching_float(self) -> AbstractContextManager[object]:
        """Return a context in which the float network runs once on all batches, in order.

        The pass is the one in which the ranges are measured, so that it costs nothing more: hooks can note what layers
        compute. By default nothing is noted.
        """
        return nullcontext()

    @abstractmethod
    def improve(self, batches: Iterable[Tensor], count_batch: Callable[[], object]) -> None:
        """Set the states of the method at each precision below 32, in place.

        The ranges are set, and the methods before this one in the list have run. The model comes with its own modes and
        precision, which this restores; hooks are removed and no gradient is left. The same images give the same result.

        Args:
            batches: images (n, C, H, W) in [0, 1] on the model's device; each iteration reads them anew, in order.
            count_batch: called after each batch of each pass.
        """


@plugin
class PtqMethod(ABC):
    """A method that improves a calibrated model at precisions below 32 (bias correction, learned rounding, ...)."""

    def prepare(self, model: nn.Module) -> None:
        """Add the states of the method to a switchable model, in place, where it has none; they change nothing yet.

        A model that is loaded is prepared before its state dict is read, so the names and shapes of the states follow
        from the model and the options of the method alone. By default there are none.
        """
        return

    @abstractmethod
    def start(self, model: nn.Module) -> PtqRun:
        """Return a run on a prepared switchable model, before its ranges are measured."""


class PtqState(nn.Module, ABC):
    """A module that keeps what a PTQ method found, as buffers.

    Args:
        method: the method that it belongs to.
    """

    def __init__(self, method: PtqMethod) -> None:
        super().__init__()
        self.method = method

    @abstractmethod
    def reset(self) -> None:
        """Return to the state that changes nothing, in place."""


def ptq_states(model: nn.Module) -> list[PtqState]:
    """Return every state of PTQ methods in a model."""
    return [module for module in model.modules() if isinstance(module, PtqState)]


def ptq_methods(model: nn.Module) -> tuple[PtqMethod, ...]:
    """Return the PTQ methods that have states in a model, without repeats."""
    found: list[PtqMethod] = []
    for state in ptq_states(model):
        if state.method not in found:
            found.append(state.method)
    return tuple(found)


def quantized_precisions(model: nn.Module) -> list[Precision]:
    """Return the precisions that PTQ methods improve: all below 32."""
    return [precision for precision in allowed_precisions(model) if not precision.is_float]
