"""Brevitas layers with switchable quantizers, which compute on plain tensors.

Brevitas's own forward creates a QuantTensor in every call. These layers skip that, unless the input is a QuantTensor or
an export is in progress.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from brevitas.nn import QuantConv2d, QuantIdentity, QuantLinear, QuantReLU
from brevitas.proxy import ActQuantProxyFromInjector
from brevitas.quant_tensor import QuantTensor
from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.quant.integer_conv import integer_product
from qadtr_brevitas.quant.products import products_not_intercepted
from qadtr_brevitas.quant.proxies import SwitchableActProxy, SwitchableWeightProxy
from qadtr_brevitas.quant.ptq import CHANGES_SHARED_WEIGHTS, PtqMethod, PtqState
from qadtr_brevitas.quant.switch import Switch, SwitchState
from qadtr_brevitas.quant.switchable_quant import WIDE_BITS

# Brevitas's algorithms keep the float weights here before they change them.
_BACKUP_OF_BREVITAS = "weight_orig"
# Torch has no public way to move hooks.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


class BiasOffsets(PtqState):
    """The offset per output channel that a layer adds to its bias at each precision below 32.

    Args:
        method: the method that measures them.
        switch: the model's switch.
        like: a tensor with one value per output channel, of the device and type of the offsets.
    """

    def __init__(self, method: PtqMethod, switch: Switch, like: Tensor) -> None:
        super().__init__(method)
        self.switch = switch
        for precision in switch.allowed:
            if not precision.is_float:
                self.register_buffer(str(precision), torch.zeros_like(like))

    def reset(self) -> None:
        for offset in self.buffers():
            offset.zero_()

    def offset(self, precision: Precision) -> Tensor:
        """Return the offset at a precision below 32, (out,)."""
        return self.get_buffer(str(precision))

    def forward(self, bias: Tensor | None, precision: Precision) -> Tensor | None:
        """Return the corrected bias at a precision, (out,)."""
        if precision.is_float:
            return bias
        offset = self.offset(precision)
        return offset if bias is None else bias + offset


class _FastPath:
    """The common part of convolutions and linear layers."""

    export_mode: bool
    weight: Any
    bias: Any
    input_quant: ActQuantProxyFromInjector
    weight_quant: SwitchableWeightProxy
    bias_correction: BiasOffsets | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_module("bias_correction", None)  # pyright: ignore

    def forward(self, input: Any) -> Any:  # named as in Brevitas
        if self.export_mode or isinstance(input, QuantTensor):
            return super().forward(input)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
        quant, weight_quant = self.input_quant, self.weight_quant
        now = weight_quant.quantizer.switch.states.now
        x = quant.quantize(input, now) if isinstance(quant, SwitchableActProxy) else input
        if not torch._C._len_torch_function_stack():  # pyright: ignore[reportPrivateUsage]
            return self._product(x, now)
        with products_not_intercepted():
            return self._product(x, now)

    def _product(self, x: Tensor, now: SwitchState) -> Tensor:
        weight, bias = self.fixed(now) if now.prepared is None else now.prepared.layers[id(self)]
        return super().inner_forward_impl(x, weight, bias)  # pyright: ignore

    def fixed(self, now: SwitchState) -> tuple[Tensor, Tensor | None]:
        """Return the quantized weight and the bias that the product is computed with, at the current precision."""
        return self._weight_and_bias(self.weight_quant.quantize(self.weight, now), self.bias, now)

    def inner_forward_impl(self, x: Tensor, quant_weight: Tensor, quant_bias: Tensor | None) -> Tensor:
        """Compute the product in Brevitas's own forward as in this one."""
        now = self.weight_quant.quantizer.switch.states.now
        weight, bias = self._weight_and_bias(quant_weight, quant_bias, now)
        return super().inner_forward_impl(x, weight, bias)  # pyright: ignore

    def _weight_and_bias(self, weight: Tensor, bias: Tensor | None, now: SwitchState) -> tuple[Tensor, Tensor | None]:
        if self.bias_correction is not None:
            bias = self.bias_correction(bias, now.precision)
        if now.folding is not None and isinstance(self, QuantConv2d):
            weight, bias = now.folding.weights(self, weight, bias)
        return weight, bias

    def reset_parameters(self) -> None:
        """Do nothing: the weights are those of a float layer."""

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        if name == _BACKUP_OF_BREVITAS:
            raise UsageError(CHANGES_SHARED_WEIGHTS)
        super().register_buffer(name, tensor, persistent)  # pyright: ignore


class SwitchableConv2d(_FastPath, QuantConv2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """QuantConv2d with switchable quantizers."""

    def _product(self, x: Tensor, now: SwitchState) -> Tensor:
        if now.prepared is not None and (found := now.prepared.integers.get(id(self))) is not None:
            assert not isinstance(self.padding, str)
            layout = self.stride, self.padding, self.dilation, self.groups
            return integer_product(x, found, now.prepared.layers[id(self)][1], layout)
        return super()._product(x, now)


class SwitchableLinear(_FastPath, QuantLinear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """QuantLinear with switchable quantizers."""


SwitchableLayer: TypeAlias = SwitchableConv2d | SwitchableLinear
"""A layer with a switchable weight."""


def switchable_layers(model: nn.Module) -> dict[str, SwitchableLayer]:
    """Return the layers with switchable weights, by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SwitchableLayer)}


def low_bit_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the float weights, by module name, of the layers that are quantized to less than 8 bit."""
    layers = switchable_layers(model).items()
    return {name: layer.weight for name, layer in layers if layer.weight_quant.quantizer.min_bits < WIDE_BITS}


def brevitas_twin(module: nn.Module, conv: Any, linear: Any, **quantizers: Any) -> nn.Module:
    """Return a Brevitas layer of the geometry of a Conv2d or Linear, with the same weight and bias parameters.

    Args:
        module: a convolution or linear layer, float or Brevitas.
        conv: class that replaces a convolution.
        linear: class that replaces a linear layer.
        quantizers: `weight_quant` and `input_quant`.
    """
    assert isinstance(module, nn.Conv2d | nn.Linear)
    has_bias = module.bias is not None
    if isinstance(module, nn.Linear):
        twin = linear(module.in_features, module.out_features, has_bias, **quantizers)
    else:
        names = ("stride", "padding", "dilation", "groups", "padding_mode")
        geometry = {name: getattr(module, name) for name in names}
        twin = conv(
            module.in_channels, module.out_channels, module.kernel_size, bias=has_bias, **geometry, **quantizers
        )
    twin.weight, twin.bias = module.weight, module.bias
    return twin


class _ActivationFastPath:
    """The common part of quantizers of activations."""

    export_mode: bool
    act_quant: SwitchableActProxy

    def forward(self, input: Any) -> Any:  # named as in Brevitas
        if self.export_mode or isinstance(input, QuantTensor):
            return super().forward(input)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
        return self.act_quant.quantize(input)


class SwitchableIdentity(_ActivationFastPath, QuantIdentity):  # pyright: ignore[reportIncompatibleVariableOverride]
    """QuantIdentity with a switchable quantizer, of activations or of a weight that is computed in the forward."""


class SwitchableReLU(_ActivationFastPath, QuantReLU):  # pyright: ignore[reportIncompatibleVariableOverride]
    """QuantReLU with a switchable quantizer, which is the ReLU below 32 bit."""


class SwitchableReLU6(SwitchableReLU):
    """ReLU6 with a switchable quantizer, whose threshold never exceeds 6."""

    def __init__(self, act_quant: Any) -> None:
        super().__init__(act_quant=act_quant)
        self.act_quant.fused_activation_quant_proxy.activation_impl = nn.ReLU6()


class SwitchableGate(nn.Module):
    """A sigmoid or similar gate, whose values from 0 to 1 are quantized.

    Args:
        gate: the float module.
        act_quant: injector of an unsigned quantizer.
    """

    def __init__(self, gate: nn.Module, act_quant: Any) -> None:
        super().__init__()
        self.gate = gate
        self.quant = SwitchableIdentity(act_quant)

    def forward(self, x: Tensor) -> Tensor:
        return self.quant(self.gate(x))


def keep_hooks(module: nn.Module, replacement: nn.Module) -> None:
    """Move the hooks of a module that is replaced to its replacement, which may hold the module."""
    for name in _HOOKS:
        if hooks := vars(module)[name]:
            vars(replacement)[name] = hooks
            vars(module)[name] = None if isinstance(hooks, bool) else type(hooks)()
