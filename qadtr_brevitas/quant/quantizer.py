"""The contract of quantizers: which levels there are, which thresholds, how values are rounded and what can be frozen.

A quantizer is a plug-in without state of its own. The thresholds it works with are parameters of the modules in
`quant/quantizers.py`, one for each bit-width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.registry import QUANTIZERS

Levels = tuple[int, int]
"""Lowest and highest integer level."""

Granularity = Literal["tensor", "channel", "group"]


class Quantizer(ABC):
    """How values become levels, around a threshold: the largest magnitude that is not clipped.

    Attributes:
        granularity: what has a threshold of its own: a weight tensor, an output channel, or a group of input channels
            of an output channel; None for what `quant.per_channel` says. Activations have one per tensor.
        group_size: input channels of a group.
        stock: whether Brevitas's own quantizers, and so every export format, hold the same levels.
        halving: whether thresholds are a power of two apart, so that the search for one tries only such.
    """

    granularity: Granularity | None
    group_size: int
    stock: bool = True
    halving: bool = False

    @abstractmethod
    def levels(self, bits: int, *, signed: bool, narrow_range: bool) -> Levels:
        """Return the lowest and the highest integer level of a bit-width, of which there are at most 2^bits."""

    @abstractmethod
    def steps_per_threshold(self, levels: Levels) -> int:
        """Return the threshold in steps."""

    @abstractmethod
    def reach(self, levels: Levels) -> float:
        """Return the magnitude, in steps, up to which no value is off by more than rounding explains."""

    def nearest_threshold(self, threshold: Tensor, levels: Levels, *, limit: float | None, above: bool) -> Tensor:
        """Return the nearest threshold that the quantizer may have, or the next one above; no more than `limit`.

        Args:
            threshold: positive, of any shape.
            levels: the integer levels.
            limit: the highest threshold, which `threshold` does not exceed; None for no limit.
            above: do not clip more than `threshold` does.
        """
        return threshold

    @abstractmethod
    def round(self, scaled: Tensor, levels: Levels, *, out: Tensor | None = None) -> Tensor:
        """Round values in steps to the nearest level, in steps; without a gradient.

        Args:
            scaled: values divided by the step, of any shape.
            levels: the integer levels.
            out: where the result is written, if given.
        """

    @abstractmethod
    def quantize_activation(self, x: Tensor, scale: Tensor, levels: Levels, *, keep_input: bool) -> Tensor:
        """Quantize and dequantize activations, with straight-through gradients.

        Args:
            x: of any shape.
            scale: the step, one element.
            levels: the integer levels.
            keep_input: whether the step may learn from rounding, which takes the memory of x, or from clipping alone.
        """

    @abstractmethod
    def quantize_weight(self, w: Tensor, scale: Tensor, levels: Levels) -> Tensor:
        """Quantize and dequantize a weight, with straight-through gradients.

        Args:
            w: of any shape.
            scale: steps that broadcast to w.
            levels: the integer levels.
        """


def make_quantizer(value: Quantizer | str | Mapping[str, Any]) -> Quantizer:
    """Return a quantizer from itself, its name, or its name and keys as a recipe has them.

    Raises:
        UsageError: the name is unknown, or a key or value is not possible.
    """
    if isinstance(value, Quantizer):
        return value
    fields = {"name": value} if isinstance(value, str) else dict(value)
    name = fields.pop("name", None)
    if not isinstance(name, str):
        raise UsageError(f"quantizer {value!r} has no name: choose from {', '.join(QUANTIZERS.names())}")
    try:
        return QUANTIZERS.load(name)(**fields)
    except (TypeError, ValueError) as error:
        raise UsageError(f"quantizer {name!r} cannot be made of {fields}: {error}") from error
