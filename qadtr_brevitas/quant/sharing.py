"""Quantizers and thresholds that a network shares, so that one tensor is quantized once for all that read it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from qadtr_brevitas.quant.layers import SwitchableIdentity, SwitchableLayer, SwitchableReLU
from qadtr_brevitas.quant.plan import ConversionPlan
from qadtr_brevitas.quant.probe import Call, Operand, Probe
from qadtr_brevitas.quant.products import QuantizedFunctions, QuantizedProduct
from qadtr_brevitas.quant.proxies import SwitchableActProxy
from qadtr_brevitas.quant.switchable_quant import WIDE_BITS, SwitchableActQuant


def share_quantizers(net: nn.Module, found: Probe) -> None:
    """Give activation modules whose outputs are concatenated the quantizer of the first of them, in place."""
    for group in found.joined:
        modules = [net.get_submodule(name) for name in sorted(group)]
        first, *others = (module for module in modules if isinstance(module, SwitchableReLU))
        for other in others:
            other.act_quant.fused_activation_quant_proxy.tensor_quant = first.act_quant.quantizer


def pass_wide_values(net: nn.Module, plan: ConversionPlan) -> None:
    """Let quantizers that read an activation which keeps 8 bit pass its values where they want as many, in place."""
    for call in plan.probe.calls.values():
        for operand, quantizer in _quantizers(net, call):
            if plan.is_wide_stream(operand.origin) or plan.is_wide_end(operand.origin):
                quantizer.held_bits = WIDE_BITS


def share_thresholds(net: nn.Module, found: Probe) -> None:
    """Give all quantizers that read one tensor the same threshold at a bit-width that several have, in place.

    A sum keeps 8 bit where a layer that reads the same values has fewer, so they cannot share a quantizer.
    """
    readers: dict[int, list[SwitchableActQuant]] = {}
    for call in found.calls.values():
        for operand, quantizer in _quantizers(net, call):
            if operand.tensor is not None and not quantizer.held_bits:
                readers.setdefault(operand.tensor, []).append(quantizer)
    for first, *others in readers.values():
        for other in others:
            if (other.signed, other.shape, other.scheme) != (first.signed, first.shape, first.scheme):
                continue
            for bits in other.thresholds.keys() & first.thresholds.keys():
                other.thresholds[bits] = first.thresholds[bits]


def _quantizers(net: nn.Module, call: Call) -> Iterator[tuple[Operand, SwitchableActQuant]]:
    """Yield the operands of a module's products that have quantizers of activations, with these."""
    module = net.get_submodule(call.name)
    if isinstance(module, SwitchableLayer):
        if isinstance(module.input_quant, SwitchableActProxy):
            yield call.products[0].operands[0], module.input_quant.quantizer
        return
    if not isinstance(module, QuantizedFunctions):
        return
    for product, quantized in zip(call.products, module.product_quant, strict=True):
        assert isinstance(quantized, QuantizedProduct)
        operands = {operand.label: operand for operand in product.operands}
        for label, identity in quantized.operands.items():
            quantizer = identity.act_quant.quantizer if isinstance(identity, SwitchableIdentity) else None
            if label in operands and isinstance(quantizer, SwitchableActQuant):
                yield operands[label], quantizer
