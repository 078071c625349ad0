"""Brevitas's own algorithms that choose levels of weights, run on a frozen copy of the model at each precision."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.quant.freeze import freeze
from qadtr_brevitas.quant.layers import SwitchableLayer, switchable_layers
from qadtr_brevitas.quant.model import SwitchableModel
from qadtr_brevitas.quant.ptq import PtqRun, quantized_precisions
from qadtr_brevitas.quant.rounding_method import RoundingMethod, set_levels, wanted_weight
from qadtr_brevitas.quant.switch import at_precision

with warnings.catch_warnings():
    # It names an optional package that is not needed here.
    warnings.simplefilter("ignore")
    from brevitas.graph.gpfq import gpfq_mode
    from brevitas.graph.qronos import Qronos as BrevitasQronos


@plugin
class BrevitasRounding(RoundingMethod):
    """Run an algorithm of `brevitas.graph` that changes weights so that their nearest levels are better ones."""

    act_order: Annotated[bool, Field(description="begin with the largest inputs")] = True

    @abstractmethod
    def mode(self, model: nn.Module) -> Any:
        """Return Brevitas's context manager (a `gpxq_mode`) for a frozen model."""

    def start(self, model: nn.Module) -> PtqRun:
        return _BrevitasRun(self, model)


@plugin
class Gpfq(BrevitasRounding):
    """Greedy path following: each weight makes up for the errors of those before it (Lybrand and Saab 2021).

    Source: `brevitas.graph.gpfq`; https://epubs.siam.org/doi/abs/10.1137/22M1511709.
    """

    def mode(self, model: nn.Module) -> Any:
        return gpfq_mode(model, act_order=self.act_order, create_weight_orig=True)


@plugin
class Qronos(BrevitasRounding):
    """Correct past errors, then pass on those of the future (Zhang et al. 2025): GPFQ with a GPTQ step.

    Source: `brevitas.graph.qronos`; https://openreview.net/forum?id=7axclBCYul.
    """

    alpha: Annotated[float, Field(gt=0, description="damping, as a share of the largest singular value")] = 1e-6

    def mode(self, model: nn.Module) -> Any:
        algorithm: Any = partial(BrevitasQronos, alpha=self.alpha)
        return gpfq_mode(model, act_order=self.act_order, create_weight_orig=True, algorithm_impl=algorithm)


class _BrevitasRun(PtqRun):
    def __init__(self, method: BrevitasRounding, model: nn.Module) -> None:
        assert isinstance(model, SwitchableModel)
        self._method = method
        self._model = model
        self.passes = len(quantized_precisions(model)) * len(switchable_layers(model))

    def improve(self, batches: Iterable[Tensor], count_batch: Callable[[], object]) -> None:
        for precision in quantized_precisions(self._model):
            frozen = self._frozen(precision)
            with torch.no_grad(), _expected_warnings(), self._method.mode(frozen) as mode:
                for _ in range(len(switchable_layers(self._model))):
                    for images in batches:
                        mode.model(images)
                        count_batch()
                    mode.update()
            self._take_levels(frozen, precision)

    def _frozen(self, precision: Precision) -> nn.Module:
        """Return a frozen copy with float weights instead of those that an earlier method rounded."""
        frozen = freeze(self._model, precision)
        for copied, layer in self._copies(frozen):
            copied.weight = nn.Parameter(wanted_weight(layer).clone())
        return frozen

    def _take_levels(self, frozen: nn.Module, precision: Precision) -> None:
        for copied, layer in self._copies(frozen):
            quantizer = layer.weight_quant.quantizer
            with at_precision(self._model, precision), torch.no_grad():
                if quantizer.is_active:
                    step = quantizer.step_of_each(layer.weight, quantizer.bits)
                    set_levels(self._model, layer, precision, (copied.quant_weight().value / step).round())

    def _copies(self, frozen: nn.Module) -> list[tuple[Any, SwitchableLayer]]:
        """Return each layer of a frozen copy, and the layer that it is a copy of."""
        own = switchable_layers(self._model)
        return [(module, own[name]) for name, module in frozen.named_modules() if name in own]


@contextmanager
def _expected_warnings() -> Generator[None]:
    """Hide the warning about hooks: those of a frozen copy only keep products from being quantized twice."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Hooks detected")
        yield
