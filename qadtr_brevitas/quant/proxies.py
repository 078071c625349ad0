"""Brevitas proxies with switchable quantizers, and the injectors that create them.

Only `tensor_quant` is defined here; proxies and layers are Brevitas's, so `quant_weight()`, QuantTensor and Brevitas's
own tools work at every precision below 32. At 32 bit the proxies are disabled, and the layer computes what the float
layer computes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from brevitas.inject import ExtendedInjector
from brevitas.proxy import ActQuantProxyFromInjector, WeightQuantProxyFromInjector
from brevitas.quant_tensor import IntQuantTensor
from torch import Tensor, nn

from qadtr_brevitas.quant.pickling import allow_pickling
from qadtr_brevitas.quant.products import products_not_intercepted
from qadtr_brevitas.quant.switch import Switch, SwitchState
from qadtr_brevitas.quant.switchable_quant import (
    SwitchableActQuant,
    SwitchableDynamicQuant,
    SwitchablePixelQuant,
    SwitchableWeightQuant,
)
from qadtr_brevitas.quant.tensor_levels import quantize_fixed
from qadtr_brevitas.quant.uniform import Uniform

allow_pickling()


class _KeepTensorQuant:
    """Mixin that creates `tensor_quant` once.

    Brevitas creates it again whenever a state dict is loaded or a parameter is assigned. Optimizers hold the thresholds
    of the first one, and copies of a model have switches of their own, so it must not be replaced.
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
        """The switchable quantizer module."""
        return self.tensor_quant

    @property
    def is_quant_enabled(self) -> bool:
        return not self.disable_quant and self.quantizer.is_active

    @property
    def per_channel(self) -> bool:
        """Whether there is more than one threshold."""
        return math.prod(self.quantizer.shape) > 1

    def quantize(self, w: Tensor, now: SwitchState | None = None) -> Tensor:
        """Return the quantized weight as a plain tensor.

        Args:
            w: weight, (out, in, ...).
            now: the state of the switch, where the caller has read it.
        """
        if not torch._C._len_torch_function_stack():  # pyright: ignore[reportPrivateUsage]
            return self._quantized(w, now)
        # What a quantizer adds is no sum of the module around it.
        with products_not_intercepted():
            return self._quantized(w, now)

    def _quantized(self, w: Tensor, now: SwitchState | None) -> Tensor:
        quantizer = self.quantizer
        now = quantizer.switch.states.now if now is None else now
        if now.observer is not None:
            observed = now.observer(quantizer, w)
            return w if observed is None else observed
        if not self.disable_quant and quantizer.is_active_at(now.precision):
            return quantizer.quantize(w, now)
        return w


class SwitchableActProxy(_KeepTensorQuant, ActQuantProxyFromInjector):
    """Brevitas's activation proxy, disabled at 32 bit, and without a separate ReLU below.

    An unsigned quantizer clamps at 0 and passes no gradient there, so it is the ReLU.
    """

    fused_activation_quant_proxy: Any

    @property
    def quantizer(self) -> SwitchableActQuant:
        """The switchable quantizer module inside Brevitas's wrapper."""
        return self.fused_activation_quant_proxy.tensor_quant

    @property
    def is_quant_enabled(self) -> bool:
        return self._is_quant_enabled and not self.disable_quant and self.quantizer.is_active

    @is_quant_enabled.setter
    def is_quant_enabled(self, is_quant_enabled: bool) -> None:
        self._is_quant_enabled = is_quant_enabled

    def quantize(self, x: Tensor, now: SwitchState | None = None) -> Tensor:
        """Return the quantized activations as a plain tensor.

        Args:
            x: activations of any shape.
            now: the state of the switch, where the caller has read it.
        """
        if not torch._C._len_torch_function_stack():  # pyright: ignore[reportPrivateUsage]
            return self._quantized(x, now)
        with products_not_intercepted():
            return self._quantized(x, now)

    def _quantized(self, x: Tensor, now: SwitchState | None) -> Tensor:
        fused = self.fused_activation_quant_proxy
        quantizer: SwitchableActQuant = fused.tensor_quant
        now = quantizer.switch.states.now if now is None else now
        if now.observer is not None:
            observed = now.observer(quantizer, x)
            if observed is not None:
                return observed
        elif now.prepared is not None and id(quantizer) in now.prepared.acts:
            return quantize_fixed(x, now.prepared.acts[id(quantizer)], by_input=quantizer.passes_by_input)
        elif self._is_quant_enabled and not self.disable_quant and quantizer.is_active_at(now.precision):
            return quantizer.quantize(x, now)
        activation = fused.activation_impl
        if now.folding is not None and now.folding.in_place and isinstance(activation, nn.ReLU):
            return x.relu_()
        return activation(x)

    def forward(self, x: Any) -> Any:
        if self.export_mode or not self.is_quant_enabled:
            return super().forward(x)
        value = x.value if isinstance(x, IntQuantTensor) else x
        if self.quantizer.dynamic:
            # Brevitas's arithmetic on QuantTensors has no scale per image.
            return self.quantizer.quantize(value, self.quantizer.switch.states.now)
        return self.create_quant_tensor(self.quantizer(value), x=x)


def weight_injector(switch: Switch, **settings: Any) -> Any:
    """Return the injector of a weight quantizer; settings are those of SwitchableQuant."""
    return _WeightInjector.let(switch=switch, **settings)


def act_injector(switch: Switch, *, dynamic: bool = False, reads_pixels: bool = False, **settings: Any) -> Any:
    """Return the injector of an activation quantizer.

    Args:
        switch: the model's switch.
        dynamic: whether ranges are measured at run time.
        reads_pixels: whether it quantizes the image.
        settings: those of SwitchableQuant.
    """
    injector = _DynamicInjector if dynamic else _PixelInjector if reads_pixels else _ActInjector
    return injector.let(switch=switch, **settings)


# A metaclass creates injectors, which type checkers cannot follow.
_Injector: Any = ExtendedInjector


class _WeightInjector(_Injector):
    proxy_class = SwitchableWeightProxy
    tensor_quant = SwitchableWeightQuant
    signed = True
    max_threshold = None
    scheme = Uniform()


class _ActInjector(_Injector):
    proxy_class = SwitchableActProxy
    tensor_quant = SwitchableActQuant
    narrow_range = False
    max_threshold = None
    scheme = Uniform()
    shape = ()


class _DynamicInjector(_ActInjector):
    tensor_quant = SwitchableDynamicQuant


class _PixelInjector(_ActInjector):
    tensor_quant = SwitchablePixelQuant
