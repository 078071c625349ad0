"""Modules that hold the learned thresholds of every bit-width, and quantize at the current one.

How values map to levels is defined by a `Quantizer` (`quant/quantizer.py`). How the modules plug into Brevitas is in
`quant/proxies.py`.
"""

from __future__ import annotations

import torch
from brevitas.core.utils import StatelessBuffer
from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import FLOAT_BITS, Precision
from qadtr_brevitas.quant.fake_quantize import quantize_by
from qadtr_brevitas.quant.frozen import version_of
from qadtr_brevitas.quant.quantizer import SMALLEST_THRESHOLD, Levels, Quantizer
from qadtr_brevitas.quant.rounding import WeightRounding
from qadtr_brevitas.quant.switch import Switch, SwitchState
from qadtr_brevitas.quant.tensor_levels import TensorLevels
from qadtr_brevitas.quant.uniform import is_uniform

# First and last layers and residual streams keep at least this many bits by default.
WIDE_BITS = 8
# The image's largest value is half a step above the highest level, but for the rounding of floats.
_HALF_STEP = 0.5001


class SwitchableQuant(nn.Module):
    """The common part of weight and activation quantizers: one learned threshold per bit-width, and the levels.

    The threshold is the largest magnitude that is not clipped, as in Brevitas's IntScaling. Thresholds are separate
    parameters, not one stacked tensor, so that the optimizer does not touch those of other bit-widths.

    Args:
        switch: the model's switch.
        bits: the bit-widths of the thresholds.
        min_bits: the least bit-width at every precision below 32 (8 for first and last layers).
        signed: whether levels are on both sides of 0, or from 0 upwards.
        narrow_range: leave out the lowest level, so that signed levels are symmetric (2 bit: -1, 0, 1).
        shape: shape of a threshold, e.g. (out, 1, 1, 1) for one per output channel.
        max_threshold: upper bound of thresholds (6 for ReLU6); None for no bound.
        scheme: how values map to levels.
    """

    dynamic = False
    """Whether ranges are measured at run time, without thresholds."""

    def __init__(
        self,
        switch: Switch,
        bits: tuple[int, ...],
        min_bits: int,
        signed: bool,
        narrow_range: bool,
        shape: tuple[int, ...],
        max_threshold: float | None,
        scheme: Quantizer,
    ) -> None:
        super().__init__()
        self.switch = switch
        self.min_bits = min_bits
        self.signed = signed
        self.narrow_range = narrow_range
        self.shape = shape
        self.max_threshold = max_threshold
        self.scheme = scheme
        # Where a PTQ method chose the levels of weights.
        self.register_module("rounding", None)
        held = sorted({max(b, min_bits) for b in bits})
        learned = [] if self.dynamic else held
        self.thresholds = nn.ParameterDict({str(b): nn.Parameter(torch.ones(shape)) for b in learned})
        self.zero_point = StatelessBuffer(torch.tensor(0.0))
        self.bit_widths = nn.ModuleDict({str(b): StatelessBuffer(torch.tensor(float(b))) for b in held})
        # The bit-width at each mixed precision, by its name.
        self.mixed: dict[str, int] = {}

    def use_at(self, name: str, bits: int) -> None:
        """Quantize to a bit-width at the mixed precision of a name, with a threshold for it; 32 for no quantization."""
        self.mixed[name] = bits
        held = str(max(bits, self.min_bits))
        if bits == FLOAT_BITS or held in self.bit_widths:
            return
        self.bit_widths[held] = StatelessBuffer(torch.tensor(float(held)))
        if not self.dynamic:
            self.thresholds[held] = nn.Parameter(torch.ones(self.shape))

    def nominal_bits(self, precision: Precision) -> int:
        """Return the bit-width of a precision; 32 for no quantization."""
        raise AssertionError

    def is_active_at(self, precision: Precision) -> bool:
        """Return whether a precision quantizes: false at 32 bit."""
        return self.nominal_bits(precision) != FLOAT_BITS

    def bits_at(self, precision: Precision) -> int:
        """Return the bit-width at a precision, at least `min_bits`."""
        return max(self.nominal_bits(precision), self.min_bits)

    @property
    def is_active(self) -> bool:
        """Whether the current precision quantizes."""
        return self.is_active_at(self.switch.precision)

    @property
    def bits(self) -> int:
        """The current bit-width, at least `min_bits`."""
        return self.bits_at(self.switch.precision)

    def levels(self, bits: int) -> Levels:
        """Return the lowest and highest integer level at a bit-width."""
        return self.scheme.levels(bits, signed=self.signed, narrow_range=self.narrow_range)

    def steps_per_threshold(self, bits: int) -> int:
        """Return the number of steps between 0 and the threshold."""
        return self.scheme.steps_per_threshold(self.levels(bits))

    def reach(self, bits: int) -> float:
        """Return the magnitude, in steps, up to which values are not clipped."""
        return self.scheme.reach(self.levels(bits))

    def threshold(self, bits: int) -> Tensor:
        """Return the threshold at a bit-width, positive."""
        threshold = self.thresholds[str(bits)].abs().clamp(SMALLEST_THRESHOLD, self.max_threshold)
        nearest = self._nearest(threshold, bits, above=False)
        # A threshold that is moved to the nearest possible one learns as a factor of it.
        return threshold if nearest is threshold else nearest * (threshold / threshold.detach())

    def _nearest(self, threshold: Tensor, bits: int, *, above: bool) -> Tensor:
        return self.scheme.nearest_threshold(threshold, self.levels(bits), limit=self.max_threshold, above=above)

    def scale(self, bits: int) -> Tensor:
        """Return the step at a bit-width, positive, in the shape of the threshold."""
        return self.threshold(bits) / self.steps_per_threshold(bits)


class SwitchableActQuant(SwitchableQuant):
    """Activation quantizer: per tensor or per attention head, one learned threshold per bit-width.

    A quantizer that never has less than 8 bit learns its threshold as PACT does, which needs less memory.
    """

    held_bits = 0
    """The least bit-width that the values have already; at this and above they pass. 0: they are not quantized."""

    def nominal_bits(self, precision: Precision) -> int:
        return precision.act or self.mixed[precision.name]

    def is_active_at(self, precision: Precision) -> bool:
        # At a mixed precision what it reads may be float.
        if not self.held_bits or precision.is_mixed or precision.is_float:
            return super().is_active_at(precision)
        return self.bits_at(precision) < max(precision.act, self.held_bits)

    def quantize(self, x: Tensor, now: SwitchState | None = None) -> Tensor:
        """Quantize and dequantize x at the current precision, which must be below 32.

        Args:
            x: activations of any shape.
            now: the state of the switch, where the caller has read it.
        """
        now = self.switch.states.now if now is None else now
        bits = self.bits_at(now.precision)
        if self.shape:
            # In float16 a small step would be 0.
            return self.scheme.quantize_weight(x, self.scale(bits), self.levels(bits)).to(x.dtype)
        return self.scheme.quantize_activation(x, self.scale(bits), self.levels(bits), keep_input=self.keeps_input)

    @property
    def keeps_input(self) -> bool:
        """Whether the threshold learns from rounding errors, and not as in PACT."""
        return self.min_bits < WIDE_BITS

    @property
    def passes_by_input(self) -> bool:
        """Whether gradients pass where the input, and not its quantized value, is in the range."""
        return self.keeps_input

    def fixed_levels(self, now: SwitchState) -> TensorLevels | None:
        """Return step and levels at the current precision as tensors; None if they are not all of this quantizer."""
        if self.shape or not is_uniform(self.scheme):
            return None
        bits = self.bits_at(now.precision)
        step = self.scale(bits).detach().float()
        ends = [step.new_tensor(end) for end in (*self.levels(bits), *self._passing_steps(self.levels(bits)))]
        return TensorLevels(step, ends[0], ends[1], ends[2] * step, ends[3] * step)

    def _passing_steps(self, levels: Levels) -> tuple[float, float]:
        return self.scheme.passing(levels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Brevitas's contract: (dequantized value, scale, zero point, bit-width)."""
        now = self.switch.states.now
        bits = self.bits_at(now.precision)
        return self.quantize(x, now), self.scale(bits), self.zero_point(), self.bit_widths[str(bits)]()


class SwitchablePixelQuant(SwitchableActQuant):
    """Activation quantizer of the image, which passes gradients at its ends too.

    White and black lie on the ends, or half a step beyond, where other quantizers pass no gradient: a pixel that an
    attack has made white could never change again.
    """

    @property
    def passes_by_input(self) -> bool:
        return True

    def _passing_steps(self, levels: Levels) -> tuple[float, float]:
        low, high = super()._passing_steps(levels)
        return low - _HALF_STEP, high + _HALF_STEP

    def quantize(self, x: Tensor, now: SwitchState | None = None) -> Tensor:
        if not (x.requires_grad and torch.is_grad_enabled()):
            return super().quantize(x, now)
        now = self.switch.states.now if now is None else now
        bits = self.bits_at(now.precision)
        return super().quantize(x.detach(), now) + self._straight_through(x, self.scale(bits), self.levels(bits))

    def _straight_through(self, x: Tensor, scale: Tensor, levels: Levels) -> Tensor:
        """Return zeros with the gradient of x up to half a step outside of the range in which others have one."""
        low, high = self._passing_steps(levels)
        with torch.no_grad():
            steps = x / scale
            inside = (steps >= low) & (steps <= high)
        passed = x * inside
        return passed - passed.detach()


class SwitchableDynamicQuant(SwitchableActQuant):
    """Activation quantizer that measures the range of each image at run time.

    The range of an image does not depend on other images, so neither do its logits. Gradients pass straight through
    within the range. There are no thresholds to calibrate or learn.
    """

    dynamic = True

    def threshold(self, bits: int) -> Tensor:
        raise UsageError(
            "a dynamic quantizer has no threshold, because it measures the range of each image: "
            "convert with activations='static' for thresholds"
        )

    def fixed_levels(self, now: SwitchState) -> TensorLevels | None:
        return None

    def image_scales(self, x: Tensor, bits: int) -> Tensor:
        """Return the step of each image, (images,), or one of all, (1,), if the length is not a multiple of images.

        Args:
            x: activations, image after image; the windows and heads of an image share its step.
            bits: the bit-width.
        """
        images = self.switch.images if len(x) % self.switch.images == 0 else 1
        values = x.detach().unflatten(0, (images, -1))
        others = tuple(range(1, values.dim()))
        largest = values.amax(others)
        if self.signed:
            largest = torch.maximum(largest, -values.amin(others))
        scale = largest.float().clamp(SMALLEST_THRESHOLD, self.max_threshold) / self.reach(bits)
        threshold = scale * self.steps_per_threshold(bits)
        nearest = self._nearest(threshold, bits, above=True)
        return scale if nearest is threshold else nearest / self.steps_per_threshold(bits)

    def quantize(self, x: Tensor, now: SwitchState | None = None) -> Tensor:
        bits = self.bits if now is None else self.bits_at(now.precision)
        low, high = -torch.inf if self.signed else 0.0, self.max_threshold or torch.inf
        return self.scheme.quantize_images(x, self.image_scales(x, bits), self.levels(bits), low=low, high=high)


class SwitchableWeightQuant(SwitchableQuant):
    """Weight quantizer: one learned threshold per bit-width for each output channel, group of inputs, or tensor.

    The shape of a threshold per group is (out, groups, 1, ...): one dimension more than the weight has.
    """

    rounding: WeightRounding | None

    def nominal_bits(self, precision: Precision) -> int:
        return precision.weight or self.mixed[precision.name]

    def quantize(self, w: Tensor, now: SwitchState | None = None) -> Tensor:
        """Quantize and dequantize the weight at the current precision, only once within `frozen_weights()`.

        Args:
            w: weight, (out, in, ...).
            now: the state of the switch, where the caller has read it.
        """
        now = self.switch.states.now if now is None else now
        bits, frozen = self.bits_at(now.precision), now.frozen
        if self.rounding is not None and self.rounding.learned is not None:
            return self.rounding.learned()
        offset = None if self.rounding is None else self.rounding.offset(now.precision)
        if frozen is None:
            return self._quantize(w, bits, offset)
        key = (id(self), bits, *self._changes(bits, offset))
        return frozen.get(key, w, lambda weight: self._quantize(weight, bits, offset))

    def _changes(self, bits: int, offset: Tensor | None) -> tuple[int, ...]:
        """Return how often the threshold and the rounding were changed in place, and which rounding it is."""
        changes = version_of(self.thresholds[str(bits)])
        return (changes,) if offset is None else (changes, id(offset), version_of(offset))

    def nearest_levels(self, w: Tensor, bits: int) -> Tensor:
        """Return the level that is nearest to each weight at a bit-width, in steps, in the shape of the weight."""
        levels = self.levels(bits)
        return self.scheme.round(w.detach() / self.step_of_each(w, bits), levels)

    def step_of_each(self, w: Tensor, bits: int) -> Tensor:
        """Return the step at a bit-width, in a shape that broadcasts to a weight."""
        scale = self.scale(bits)
        if not self.is_grouped(w):
            return scale
        return scale.repeat_interleave(w.shape[1] // scale.shape[1], dim=1).squeeze(2)

    def forward(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Brevitas's contract: (dequantized value, scale, zero point, bit-width)."""
        now = self.switch.states.now
        bits = self.bits_at(now.precision)
        scale = self.step_of_each(w, bits)
        return self.quantize(w, now), scale, self.zero_point(), self.bit_widths[str(bits)]()

    def is_grouped(self, w: Tensor) -> bool:
        """Return whether each group of input channels of a weight has a threshold of its own."""
        return len(self.shape) == w.dim() + 1

    def _quantize(self, w: Tensor, bits: int, offset: Tensor | None) -> Tensor:
        scale, levels = self.scale(bits), self.levels(bits)
        if not self.is_grouped(w):
            return self._rounded(w, scale, levels, offset)
        groups = scale.shape[1]
        offset = None if offset is None else offset.unflatten(1, (groups, -1))
        return self._rounded(w.unflatten(1, (groups, -1)), scale, levels, offset).flatten(1, 2)

    def _rounded(self, w: Tensor, scale: Tensor, levels: Levels, offset: Tensor | None) -> Tensor:
        if offset is None:
            return self.scheme.quantize_weight(w, scale, levels)

        def rounding(scaled: Tensor) -> Tensor:
            return (self.scheme.round(scaled, levels) + offset).clamp(*levels)

        return quantize_by(rounding, w, scale, low=levels[0], high=levels[1])


def quantizer_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the learned thresholds of every quantizer, which get no weight decay."""
    return [p for module in model.modules() if isinstance(module, SwitchableQuant) for p in module.parameters()]


def has_ranges(model: nn.Module) -> bool:
    """Return whether any quantizer's threshold was calibrated, learned or loaded, and is not the 1 it is made with.

    A model without thresholds, as with dynamic ranges alone, needs none.
    """
    thresholds = [p for m in model.modules() if isinstance(m, SwitchableQuant) for p in m.thresholds.values()]
    return not thresholds or any(bool((threshold != 1).any()) for threshold in thresholds)
