"""PTQ methods that choose the levels of weights layer by layer, by the error of the outputs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.quant.layer_inputs import LayerCalls, Moments
from qadtr_brevitas.quant.layers import SwitchableLayer, switchable_layers
from qadtr_brevitas.quant.ptq import PtqRun, quantized_precisions
from qadtr_brevitas.quant.quantizer import Levels
from qadtr_brevitas.quant.rounding_method import RoundingMethod, set_levels, wanted_weight
from qadtr_brevitas.quant.switch import at_precision, evaluating, frozen_weights

# Added to the diagonal of second moments, as a share of its mean, where a system of equations is solved.
DAMPING = 0.01


@dataclass(frozen=True)
class RoundingProblem:
    """The choice of levels for some output channels of a layer, which read the same inputs.

    The error is e H e^T summed over the channels, with e = `level` * `step` - `target` of a channel.

    Attributes:
        target: the weights to come near to, in float32, (channels, n).
        step: step of each weight, (channels, n).
        start: the levels at the start, float integers, (channels, n).
        levels: the lowest and the highest level.
        moments: second moments H of the inputs, (n, n), not all 0 on the diagonal.
    """

    target: Tensor
    step: Tensor
    start: Tensor
    levels: Levels
    moments: Tensor

    def error(self, levels: Tensor) -> Tensor:
        """Return the squared error of the outputs of each channel, summed over the inputs, (channels,)."""
        error = levels * self.step - self.target
        return ((error @ self.moments) * error).sum(1)


@plugin
class LayerwiseRounding(RoundingMethod):
    """Choose the levels of weights layer by layer, so that the outputs of each layer come near those of float weights.

    The layers before are at their new levels already. Layers whose levels do not change the outputs, because their
    inputs are all 0, stay as they are.
    """

    target: Annotated[
        Literal["float", "quantized"],
        Field(
            description="the outputs to come near to: of the float network, so that errors of earlier layers are made "
            "up for, which takes a float forward pass more; or of float weights on the quantized inputs"
        ),
    ] = "float"
    parallel: Annotated[
        int,
        Field(
            ge=1,
            description="layers that are done after one pass over the images: more is faster, and needs "
            "target=quantized, because errors of layers that are not done yet would be made up for",
        ),
    ] = 1

    @model_validator(mode="after")
    def _no_error_is_made_up_for_twice(self) -> LayerwiseRounding:
        if self.parallel > 1 and self.target == "float":
            raise ValueError(
                f"parallel={self.parallel} makes up for errors of layers whose levels change afterwards: give "
                "target=quantized with it, or parallel=1"
            )
        return self

    @abstractmethod
    def choose(self, problem: RoundingProblem) -> Tensor:
        """Return the levels, float integers within `problem.levels`, (channels, n)."""

    def start(self, model: nn.Module) -> PtqRun:
        return _Run(self, model)


class _Run(PtqRun):
    def __init__(self, method: LayerwiseRounding, model: nn.Module) -> None:
        self._method = method
        self._model = model
        self._calls = LayerCalls(model)
        self.passes = len(quantized_precisions(model)) * -(-len(switchable_layers(model)) // method.parallel)

    def watching_float(self) -> AbstractContextManager[None]:
        return self._calls.watching()

    @torch.no_grad()
    def improve(self, batches: Iterable[Tensor], count_batch: Callable[[], object]) -> None:
        mixed = self._method.target == "float"
        for precision in quantized_precisions(self._model):
            # One block per precision, so that quantized weights of one precision only are in memory.
            with evaluating(self._model), frozen_weights(self._model):
                for part in self._calls.parts(self._method.parallel):
                    found = self._calls.moments(part, precision, batches, count_batch, mixed=mixed)
                    for layer, moments in found.items():
                        self._round(layer, moments, precision)

    def _round(self, layer: SwitchableLayer, moments: Moments, precision: Precision) -> None:
        quantizer = layer.weight_quant.quantizer
        with at_precision(self._model, precision):
            if not quantizer.is_active:
                return
            problems = _problems(layer, moments)
        set_levels(self._model, layer, precision, torch.cat([self._chosen(problem) for problem in problems]))

    def _chosen(self, problem: RoundingProblem) -> Tensor:
        if not problem.moments.diagonal().any():
            return problem.start
        levels = self._method.choose(problem)
        # Float rounding of an ill-conditioned system can make a channel worse than it was.
        better = problem.error(levels) <= problem.error(problem.start)
        return torch.where(better[:, None], levels, problem.start)


def _problems(layer: SwitchableLayer, moments: Moments) -> list[RoundingProblem]:
    """Return the problem of each group of channels of a layer."""
    quantizer, weight = layer.weight_quant.quantizer, layer.weight.detach()
    bits = quantizer.bits
    step = quantizer.step_of_each(weight, bits).expand_as(weight)
    start = (quantizer.quantize(weight) / step).round()
    groups, wanted = len(moments.quantized), wanted_weight(layer)
    by_group = [each.float().reshape(groups, weight.shape[0] // groups, -1) for each in (wanted, step, start)]
    return [
        RoundingProblem(_target(w, moments, group), s, q, quantizer.levels(bits), moments.quantized[group])
        for group, (w, s, q) in enumerate(zip(*by_group, strict=True))
    ]


def _target(weight: Tensor, moments: Moments, group: int) -> Tensor:
    """Return the weights whose outputs on quantized inputs come nearest to those of the weights on float inputs."""
    if moments.mixed is None:
        return weight
    quantized = moments.quantized[group]
    change = weight @ (moments.mixed[group] - quantized)
    return weight + torch.cholesky_solve(change.mT, factor(quantized)).mT


def factor(moments: Tensor, damping: float = DAMPING) -> Tensor:
    """Return the lower Cholesky factor of damped second moments, (n, n).

    Inputs that are always 0 count as independent ones. The damping grows until the matrix can be factored.
    """
    damped = moments.clone()
    diagonal = damped.diagonal()
    mean = diagonal.mean()
    if not mean > 0:
        return torch.eye(len(moments), device=moments.device)
    while True:
        diagonal += damping * mean
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return lower
        damping *= 10
