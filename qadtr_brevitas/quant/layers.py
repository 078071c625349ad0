"""Brevitas layers on the short way: the same modules, without making a QuantTensor for every call.

A QuantTensor in, an export in progress or a quantized bias or output take Brevitas's own way.
"""

from __future__ import annotations

from brevitas.nn import QuantConv2d, QuantIdentity, QuantLinear, QuantReLU
from brevitas.quant_tensor import QuantTensor
from torch import Tensor, nn
from torch.nn import functional as F


class SwitchableConv2d(QuantConv2d):
    """QuantConv2d with switchable quantizers."""

    def forward(self, input: Tensor | QuantTensor) -> Tensor | QuantTensor:
        if self.export_mode or isinstance(input, QuantTensor):
            return super().forward(input)
        x = self.input_quant.quantize(input) if self.input_quant.is_quant_enabled else input
        return self.inner_forward_impl(x, self.weight_quant.quantize(self.weight), self.bias)


class SwitchableLinear(QuantLinear):
    """QuantLinear with switchable quantizers."""

    def forward(self, input: Tensor | QuantTensor) -> Tensor | QuantTensor:
        if self.export_mode or isinstance(input, QuantTensor):
            return super().forward(input)
        x = self.input_quant.quantize(input) if self.input_quant.is_quant_enabled else input
        return F.linear(x, self.weight_quant.quantize(self.weight), self.bias)


class SwitchableReLU(QuantReLU):
    """QuantReLU with a switchable quantizer, which is the ReLU below 32 bit."""

    def forward(self, input: Tensor | QuantTensor) -> Tensor | QuantTensor:
        if self.export_mode or isinstance(input, QuantTensor):
            return super().forward(input)
        return self.act_quant.quantize(input)


class SwitchableReLU6(SwitchableReLU):
    """ReLU6 with a switchable quantizer, whose threshold never exceeds 6."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.act_quant.fused_activation_quant_proxy.activation_impl = nn.ReLU6()


class SwitchableIdentity(QuantIdentity):
    """QuantIdentity with a switchable quantizer."""

    def forward(self, input: Tensor | QuantTensor) -> Tensor | QuantTensor:
        if self.export_mode or isinstance(input, QuantTensor):
            return super().forward(input)
        return self.act_quant.quantize(input)
