"""The common part of PTQ methods that choose the levels of weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.plugin import plugin
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.quant.layers import SwitchableLayer, switchable_layers
from qadtr_brevitas.quant.ptq import PtqMethod
from qadtr_brevitas.quant.rounding import WeightRounding
from qadtr_brevitas.quant.switch import Switch, at_precision, switch_of


@plugin
class RoundingMethod(PtqMethod):
    """Choose the levels of the weights of convolutions and linear layers; they are kept beside the float weights."""

    def prepare(self, model: nn.Module) -> None:
        switch = switch_of(model)
        for layer in switchable_layers(model).values():
            self._prepare_layer(layer, switch)

    def _prepare_layer(self, layer: SwitchableLayer, switch: Switch) -> None:
        quantizer = layer.weight_quant.quantizer
        if quantizer.rounding is not None:
            return
        if not quantizer.scheme.has_stock_levels:
            raise UsageError(
                f"the levels of {type(quantizer.scheme).__name__} weights are not equally spaced, so a method cannot "
                "choose them by outputs: use the weight quantizer 'uniform' or 'power-of-two', or bias-correction"
            )
        bits = {p: quantizer.bits_at(p) for p in switch.allowed if quantizer.is_active_at(p)}
        quantizer.rounding = WeightRounding(self, switch, layer.weight, bits)


def wanted_weight(layer: SwitchableLayer) -> Tensor:
    """Return the weight that the levels of a layer are to come near to: the float one, or what MagR made of it."""
    rounding = layer.weight_quant.quantizer.rounding
    return layer.weight.detach() if rounding is None or rounding.wanted is None else rounding.wanted


@torch.no_grad()
def set_levels(model: nn.Module, layer: SwitchableLayer, precision: Precision, levels: Tensor) -> None:
    """Keep the levels of the weight of a layer at a precision, whole numbers in the shape of the weight."""
    quantizer = layer.weight_quant.quantizer
    with at_precision(model, precision):
        if quantizer.rounding is not None and quantizer.is_active:
            nearest = quantizer.nearest_levels(layer.weight, quantizer.bits)
            quantizer.rounding.set(precision, levels.view_as(nearest) - nearest)
