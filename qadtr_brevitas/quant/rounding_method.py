"""The common part of PTQ methods that choose the levels of weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.plugin import plugin
from qadtr_brevitas.core.precision import FLOAT_BITS, Precision
from qadtr_brevitas.quant.layers import SwitchableConv2d, SwitchableLinear
from qadtr_brevitas.quant.ptq import PtqMethod
from qadtr_brevitas.quant.rounding import WeightRounding
from qadtr_brevitas.quant.switch import Switch, at_precision, switch_of

Layer = SwitchableConv2d | SwitchableLinear


@plugin
class RoundingMethod(PtqMethod):
    """Choose the levels of the weights of convolutions and linear layers; they are kept beside the float weights."""

    def prepare(self, model: nn.Module) -> None:
        switch = switch_of(model)
        for layer in rounded_layers(model):
            self._prepare_layer(layer, switch)

    def _prepare_layer(self, layer: Layer, switch: Switch) -> None:
        quantizer = layer.weight_quant.quantizer
        if quantizer.rounding is not None:
            return
        if not quantizer.scheme.has_stock_levels:
            raise UsageError(
                f"the levels of {type(quantizer.scheme).__name__} weights are not equally spaced, so a method cannot "
                "choose them by outputs: use the weight quantizer 'uniform' or 'power-of-two', or bias-correction"
            )
        bits = {p: max(p.weight, quantizer.min_bits) for p in switch.allowed if p.weight != FLOAT_BITS}
        quantizer.rounding = WeightRounding(self, switch, layer.weight, bits)


def rounded_layers(model: nn.Module) -> list[Layer]:
    """Return the layers whose weights have levels to choose."""
    return [module for module in model.modules() if isinstance(module, SwitchableConv2d | SwitchableLinear)]


@torch.no_grad()
def set_levels(model: nn.Module, layer: Layer, precision: Precision, levels: Tensor) -> None:
    """Keep the levels of the weight of a layer at a precision, whole numbers in the shape of the weight."""
    quantizer = layer.weight_quant.quantizer
    with at_precision(model, precision):
        if quantizer.rounding is not None and quantizer.is_active:
            nearest = quantizer.nearest_levels(layer.weight, quantizer.bits)
            quantizer.rounding.set(precision, levels.view_as(nearest) - nearest)
