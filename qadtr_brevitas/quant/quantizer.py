"""The contract of quantizers: which levels and thresholds there are, and how values and gradients map to them.

A quantizer is a plug-in without state. The thresholds are parameters of the modules in `quant/switchable_quant.py`, one
per bit-width. With threshold t, the step is t / `steps_per_threshold`, and quantized values are steps times what
`round` returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from torch import Tensor

from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.core.registry import QUANTIZERS
from qadtr_brevitas.quant.fake_quantize import quantize_by, quantize_images_by

Levels = tuple[int, int]
"""Lowest and highest integer level."""

Granularity = Literal["tensor", "channel", "group"]

# Training may drive a threshold to zero, but a step must stay positive, and a normal number with 16 bit too.
SMALLEST_THRESHOLD = 1e-30


@plugin
class Quantizer(ABC):
    """A rule that maps values to levels, around a threshold: the largest magnitude that is not clipped.

    A subclass defines the levels and how values are rounded to them; gradients then pass straight through. A subclass
    overrides `quantize_activation`, `quantize_weight` and `quantize_images` for other gradients, or for speed.
    """

    granularity: Annotated[
        Granularity | None,
        Field(
            description="what has one threshold: a weight tensor, an output channel, or a group of input channels of "
            "an output channel; null: as quant.per_channel says. Activations have one per tensor"
        ),
    ] = None
    group_size: Annotated[int, Field(ge=1, description="input channels of a group")] = 32

    has_stock_levels: ClassVar[bool] = True
    """Whether Brevitas's own integer quantizers, and so all export formats, have these levels: only then is a model
    frozen and exported."""
    for_weights: ClassVar[bool] = True
    """Whether weights may have these levels: not where what lies below zero is covered to a fixed depth only."""
    doubling_thresholds: ClassVar[bool] = False
    """Whether possible thresholds are a factor of two apart, so that a range search tries only such."""

    @abstractmethod
    def levels(self, bits: int, *, signed: bool, narrow_range: bool) -> Levels:
        """Return the lowest and the highest integer level of a bit-width, of which there are at most 2^bits."""

    @abstractmethod
    def steps_per_threshold(self, levels: Levels) -> int:
        """Return the number of steps between 0 and the threshold."""

    @abstractmethod
    def reach(self, levels: Levels) -> float:
        """Return the magnitude, in steps, up to which values are rounded but not clipped."""

    @abstractmethod
    def round(self, scaled: Tensor, levels: Levels, *, out: Tensor | None = None) -> Tensor:
        """Round values in steps to the nearest level, in steps; without a gradient.

        Args:
            scaled: values divided by the step, of any shape.
            levels: the integer levels.
            out: the tensor to write the result to, if given.
        """

    def passing(self, levels: Levels) -> tuple[float, float]:
        """Return the values, in steps, strictly between which gradients pass."""
        high = float(self.steps_per_threshold(levels))
        return -high if levels[0] < 0 else 0.0, high

    def nearest_threshold(self, threshold: Tensor, levels: Levels, *, limit: float | None, above: bool) -> Tensor:
        """Return the nearest possible threshold, or the next one above; the same tensor if every one is possible.

        Args:
            threshold: positive, of any shape.
            levels: the integer levels.
            limit: the highest threshold, which `threshold` does not exceed; None for no limit.
            above: return the lowest one that clips no more than `threshold` does.
        """
        return threshold

    def quantize_activation(self, x: Tensor, scale: Tensor, levels: Levels, *, keep_input: bool) -> Tensor:
        """Quantize and dequantize activations, with straight-through gradients.

        Args:
            x: activations of any shape.
            scale: the step, one element.
            levels: the integer levels.
            keep_input: whether the step may learn from rounding errors, which takes the memory of x, or learns from
                clipped values only.
        """
        return self.quantize_weight(x, scale, levels)

    def quantize_weight(self, w: Tensor, scale: Tensor, levels: Levels) -> Tensor:
        """Quantize and dequantize a weight, with straight-through gradients.

        Args:
            w: weight of any shape.
            scale: steps that broadcast to w.
            levels: the integer levels.
        """

        def rounding(scaled: Tensor) -> Tensor:
            return self.round(scaled, levels)

        low, high = self.passing(levels)
        return quantize_by(rounding, w, scale, low=low, high=high)

    def quantize_images(self, x: Tensor, scale: Tensor, levels: Levels, *, low: float, high: float) -> Tensor:
        """Quantize and dequantize activations with a fixed step per image, with straight-through gradients.

        Args:
            x: activations whose first dimension is the number of images or a multiple, image after image.
            scale: positive steps, (images,), without a gradient.
            levels: the integer levels.
            low: values at or below it get no gradient.
            high: values at or above it get no gradient.
        """

        def rounding(scaled: Tensor) -> Tensor:
            return self.round(scaled, levels)

        return quantize_images_by(rounding, x, scale, low=low, high=high)


def make_quantizer(value: Quantizer | str | Mapping[str, Any]) -> Quantizer:
    """Return a quantizer from itself, its name, or its name and keys as in a recipe.

    Raises:
        UsageError: the name is unknown, or a key or value is not possible.
    """
    return QUANTIZERS.make(value)
