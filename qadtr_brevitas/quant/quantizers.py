"""Brevitas quantizers whose bit-width switches at run time.

They plug into Brevitas through its injectors: `tensor_quant` is ours, proxies and layers are Brevitas's, so
`quant_weight()`, QuantTensor and Brevitas's own tools keep working at every precision below 32. At 32 the proxies
report themselves disabled, and the layer computes what the float layer computes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from brevitas.core.utils import StatelessBuffer
from brevitas.inject import ExtendedInjector
from brevitas.proxy import ActQuantProxyFromInjector, WeightQuantProxyFromInjector
from brevitas.quant_tensor import IntQuantTensor
from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import FLOAT_BITS
from qadtr_brevitas.quant.fake_quantize import quantize_activation, quantize_images, quantize_weight
from qadtr_brevitas.quant.switch import Switch

# First and last layers and residual streams keep at least so many bits, unless asked otherwise.
EDGE_BITS = 8

# A threshold may be driven to zero by training; a step must stay positive (Brevitas's scaling_min_val plays this part).
_SMALLEST_THRESHOLD = 1e-6
# A step that exceeds a power of two by no more than floats round is one.
_ROUNDING = 1e-6


class SwitchableQuant(nn.Module):
    """What weight and activation quantizers share: one learned threshold per bit-width, and the levels.

    The threshold is the largest magnitude that is not clipped; the step is threshold / levels, as in Brevitas's
    IntScaling. Separate parameters, not one stacked tensor: the optimizer leaves those of other bit-widths alone.

    Args:
        switch: the model's switch.
        bits: bit-widths this quantizer holds thresholds for.
        min_bits: at least so many bits at every precision below 32 (8 for first and last layers).
        signed: symmetric around 0 if true, from 0 upwards otherwise.
        narrow_range: leave out the lowest level, so that signed levels are symmetric (2 bit: -1, 0, 1).
        shape: shape of a threshold, e.g. (out, 1, 1, 1) for one per output channel.
        max_threshold: thresholds above are taken as this (6 for ReLU6).
        power_of_two: take the power of two nearest to the learned step (below `max_threshold`, if there is one).
    """

    dynamic = False
    """Whether the range is measured at run time; there are no thresholds then."""

    def __init__(
        self,
        switch: Switch,
        bits: tuple[int, ...],
        min_bits: int,
        signed: bool,
        narrow_range: bool,
        shape: tuple[int, ...],
        max_threshold: float | None,
        power_of_two: bool = False,
    ) -> None:
        super().__init__()
        self.switch = switch
        self.min_bits = min_bits
        self.signed = signed
        self.narrow_range = narrow_range
        self.shape = shape
        self.max_threshold = max_threshold
        self.power_of_two = power_of_two
        held = sorted({max(b, min_bits) for b in bits})
        learned = [] if self.dynamic else held
        self.thresholds = nn.ParameterDict({str(b): nn.Parameter(torch.ones(shape)) for b in learned})
        self.zero_point = StatelessBuffer(torch.tensor(0.0))
        self.bit_widths = nn.ModuleDict({str(b): StatelessBuffer(torch.tensor(float(b))) for b in held})

    def nominal_bits(self) -> int:
        """The bit-width the precision in force asks for; 32 for none."""
        raise AssertionError

    @property
    def is_active(self) -> bool:
        """False at 32 bit, where nothing is quantized."""
        return self.nominal_bits() != FLOAT_BITS

    @property
    def bits(self) -> int:
        """The bit-width in force, at least `min_bits`."""
        return max(self.nominal_bits(), self.min_bits)

    def levels(self, bits: int) -> tuple[int, int]:
        """Lowest and highest integer level at a bit-width."""
        if not self.signed:
            return 0, 2**bits - 1
        return -(2 ** (bits - 1)) + int(self.narrow_range), 2 ** (bits - 1) - 1

    def steps_per_threshold(self, bits: int) -> int:
        """Number of steps between 0 and the threshold (Brevitas's IntScaling)."""
        return max(-self.levels(bits)[0], self.levels(bits)[1])

    def reach(self, bits: int) -> float:
        """The magnitude, in steps, up to which no value is off by more than half a step.

        Signed levels have one more below 0 unless their range is narrow, so this is half a step beyond the highest (as
        in PyTorch's MinMaxObserver).
        """
        lo, hi = self.levels(bits)
        return (hi - lo) / 2 if self.signed else hi

    def headroom(self, bits: int) -> float:
        """Threshold over the largest magnitude, where nothing is to be clipped."""
        return self.steps_per_threshold(bits) / self.reach(bits)

    def threshold(self, bits: int) -> Tensor:
        """The threshold at a bit-width, positive."""
        threshold = self.thresholds[str(bits)].abs().clamp(_SMALLEST_THRESHOLD, self.max_threshold)
        if not self.power_of_two:
            return threshold
        # The gradient is that of a factor.
        return self._to_power_of_two(threshold, bits, up=False) * (threshold / threshold.detach())

    def threshold_above(self, threshold: Tensor, bits: int) -> Tensor:
        """The lowest threshold the quantizer may have that clips no more than this one, or else the highest.

        Once it is stored, `threshold()` gives it as it is.

        Args:
            threshold: of any shape.
            bits: the bit-width.
        """
        threshold = threshold.detach().clamp(_SMALLEST_THRESHOLD, self.max_threshold)
        return self._to_power_of_two(threshold, bits, up=True) if self.power_of_two else threshold

    @torch.no_grad()
    def _to_power_of_two(self, threshold: Tensor, bits: int, *, up: bool) -> Tensor:
        """The nearest threshold whose step is a power of two, or the next higher one."""
        steps = self.steps_per_threshold(bits)
        step = threshold / steps
        exponent = step.log2().round()
        if up:
            exponent = exponent + (exponent.exp2() * (1 + _ROUNDING) < step)
        if self.max_threshold is not None:
            exponent = exponent.clamp(max=math.floor(math.log2(self.max_threshold / steps)))
        return exponent.exp2() * steps

    def scale(self, bits: int) -> Tensor:
        """The step at a bit-width, positive, in the shape of the threshold."""
        return self.threshold(bits) / self.steps_per_threshold(bits)


class SwitchableActQuant(SwitchableQuant):
    """Activation quantizer: per tensor, one learned threshold per bit-width.

    What never goes below 8 bit learns its threshold as PACT does, which needs less memory.
    """

    def nominal_bits(self) -> int:
        return self.switch.precision.act

    def quantize(self, x: Tensor) -> Tensor:
        """Quantizes and dequantizes x at the precision in force (below 32)."""
        bits = self.bits
        return quantize_activation(x, self.scale(bits), *self.levels(bits), keep_input=self.min_bits < EDGE_BITS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Brevitas's contract: (dequantized value, scale, zero point, bit-width)."""
        bits = self.bits
        return self.quantize(x), self.scale(bits), self.zero_point(), self.bit_widths[str(bits)]()


class SwitchableDynamicQuant(SwitchableActQuant):
    """Activation quantizer whose range is that of each image, measured when it runs.

    No image has a part in the range of another, so what is said about an image never depends on the rest of its
    batch. Gradients pass straight through within the range. There is nothing to calibrate or to learn.
    """

    dynamic = True

    def threshold(self, bits: int) -> Tensor:
        raise UsageError(
            "a dynamic quantizer has no threshold, it measures the range of each image: "
            "convert with activations='static' for thresholds"
        )

    def image_scales(self, x: Tensor, bits: int) -> Tensor:
        """The step for each image, (images,), or for all of x where its first dimension is no multiple of them, (1,).

        Args:
            x: activations, image after image (windows and heads of one image share its step).
            bits: the bit-width.
        """
        images = self.switch.images if len(x) % self.switch.images == 0 else 1
        values = x.detach().unflatten(0, (images, -1))
        others = tuple(range(1, values.dim()))
        largest = values.amax(others)
        if self.signed:
            largest = torch.maximum(largest, -values.amin(others))
        return largest.float().clamp(_SMALLEST_THRESHOLD, self.max_threshold) / self.reach(bits)

    def quantize(self, x: Tensor) -> Tensor:
        bits = self.bits
        low, high = -torch.inf if self.signed else 0.0, self.max_threshold or torch.inf
        return quantize_images(x, self.image_scales(x, bits), *self.levels(bits), low=low, high=high)


class SwitchableWeightQuant(SwitchableQuant):
    """Weight quantizer: per output channel or per tensor, one learned threshold per channel and bit-width."""

    def nominal_bits(self) -> int:
        return self.switch.precision.weight

    def quantize(self, w: Tensor) -> Tensor:
        """Quantizes and dequantizes the weight at the precision in force, once only within frozen_weights()."""
        bits, cache = self.bits, self.switch.frozen
        if cache is None:
            return quantize_weight(w, self.scale(bits), *self.levels(bits))
        key = (id(self), bits)
        if key not in cache:
            with torch.no_grad():
                cache[key] = (quantize_weight(w, self.scale(bits), *self.levels(bits)),)
        return cache[key][0]

    def forward(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Brevitas's contract: (dequantized value, scale, zero point, bit-width)."""
        bits = self.bits
        return self.quantize(w), self.scale(bits), self.zero_point(), self.bit_widths[str(bits)]()


class _KeepTensorQuant:
    """Brevitas rebuilds tensor_quant whenever a state dict is loaded or a parameter set anew.

    Ours must survive: optimizers hold its thresholds, and the switch it refers to differs between copies of a model.
    """

    def init_tensor_quant(self, *args: Any, **kwargs: Any) -> None:
        if not getattr(self, "_has_quantizer", False):
            super().init_tensor_quant(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
            self._has_quantizer = True


class SwitchableWeightProxy(_KeepTensorQuant, WeightQuantProxyFromInjector):
    """Brevitas's weight proxy, disabled at 32 bit."""

    tensor_quant: Any

    @property
    def quantizer(self) -> SwitchableWeightQuant:
        """Our quantizer."""
        return self.tensor_quant

    @property
    def is_quant_enabled(self) -> bool:
        return not self.disable_quant and self.quantizer.is_active

    @property
    def per_channel(self) -> bool:
        """Whether each output channel has a threshold of its own."""
        return math.prod(self.quantizer.shape) > 1

    def quantize(self, w: Tensor) -> Tensor:
        """The value alone, without the cost of a QuantTensor."""
        if (observer := self.quantizer.switch.observer) is not None:
            observer(self.quantizer, w)
            return w
        return self.quantizer.quantize(w) if self.is_quant_enabled else w


class SwitchableActProxy(_KeepTensorQuant, ActQuantProxyFromInjector):
    """Brevitas's activation proxy: disabled at 32 bit, and without a separate ReLU pass below.

    An unsigned quantizer clamps at 0 and its gradient is 0 there: it is the ReLU.
    """

    fused_activation_quant_proxy: Any

    @property
    def quantizer(self) -> SwitchableActQuant:
        """Our quantizer inside Brevitas's wrapper."""
        return self.fused_activation_quant_proxy.tensor_quant

    @property
    def is_quant_enabled(self) -> bool:
        return self._is_quant_enabled and not self.disable_quant and self.quantizer.is_active

    @is_quant_enabled.setter
    def is_quant_enabled(self, is_quant_enabled: bool) -> None:
        self._is_quant_enabled = is_quant_enabled

    def quantize(self, x: Tensor) -> Tensor:
        """The value alone, without the cost of a QuantTensor."""
        if (observer := self.quantizer.switch.observer) is not None:
            observer(self.quantizer, x)
        elif self.is_quant_enabled:
            return self.quantizer.quantize(x)
        activation = self.fused_activation_quant_proxy.activation_impl
        folding = self.quantizer.switch.folding
        if folding is not None and folding.in_place and isinstance(activation, nn.ReLU):
            return x.relu_()
        return activation(x)

    def forward(self, x: Any) -> Any:
        if self.export_mode or not self.is_quant_enabled:
            return super().forward(x)
        value = x.value if isinstance(x, IntQuantTensor) else x
        if self.quantizer.dynamic:
            # Brevitas's arithmetic on QuantTensors knows no scale per image.
            return self.quantizer.quantize(value)
        return self.create_quant_tensor(self.quantizer(value), x=x)


def weight_injector(switch: Switch, **settings: Any) -> Any:
    """The injector of a weight quantizer; settings are those of SwitchableQuant."""
    return _WeightInjector.let(switch=switch, **settings)


def act_injector(switch: Switch, *, dynamic: bool = False, **settings: Any) -> Any:
    """The injector of an activation quantizer, with fixed ranges or dynamic; settings are those of SwitchableQuant."""
    injector = _DynamicInjector if dynamic else _ActInjector
    return injector.let(switch=switch, **settings)


# Injectors are made by a metaclass that no type checker follows.
_Injector: Any = ExtendedInjector


class _WeightInjector(_Injector):
    proxy_class = SwitchableWeightProxy
    tensor_quant = SwitchableWeightQuant
    signed = True
    max_threshold = None
    power_of_two = False


class _ActInjector(_Injector):
    proxy_class = SwitchableActProxy
    tensor_quant = SwitchableActQuant
    narrow_range = False
    max_threshold = None
    power_of_two = False
    shape = ()


class _DynamicInjector(_ActInjector):
    tensor_quant = SwitchableDynamicQuant


def quantizer_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The learned thresholds of every quantizer; they take no weight decay."""
    return [p for module in model.modules() if isinstance(module, SwitchableQuant) for p in module.parameters()]
