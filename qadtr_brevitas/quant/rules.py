"""Conversion rules: the module that replaces each kind of float module, and its note in the report."""

from __future__ import annotations

from typing import Any

import timm.layers
from torch import nn

from qadtr_brevitas.core.errors import UsageError, first_names
from qadtr_brevitas.quant.layers import (
    SwitchableConv2d,
    SwitchableGate,
    SwitchableIdentity,
    SwitchableLinear,
    SwitchableReLU,
    SwitchableReLU6,
    brevitas_twin,
)
from qadtr_brevitas.quant.norm import BATCH_NORMS, BatchNorm, SwitchableBatchNorm
from qadtr_brevitas.quant.plan import ConversionPlan
from qadtr_brevitas.quant.probe import Call, Operand, Product
from qadtr_brevitas.quant.products import (
    ATTENTION,
    ProductQuant,
    QuantizedAttention,
    QuantizedProduct,
    QuantizedSum,
    exclude_products,
    quantize_products,
)
from qadtr_brevitas.quant.provenance import SOFTMAX
from qadtr_brevitas.quant.switchable_quant import WIDE_BITS

# Exact classes: a subclass may have another forward, which its replacement would lose.
PLAIN_LAYERS = (nn.Conv2d, nn.Linear, timm.layers.Linear)
_GATES = (nn.Sigmoid, nn.Hardsigmoid, timm.layers.Sigmoid, timm.layers.HardSigmoid)
_PASSES = "passes values through"
_NEXT = "its result is quantized where the next layer needs it"
_FLOAT_NOTES: dict[type[nn.Module], str] = {
    nn.MaxPool2d: _PASSES,
    nn.AdaptiveMaxPool2d: _PASSES,
    nn.Flatten: _PASSES,
    nn.Identity: _PASSES,
    nn.Dropout: f"{_PASSES} at inference",
    timm.layers.DropPath: f"{_PASSES} at inference",
    nn.AvgPool2d: f"a sum of quantized values; {_NEXT}",
    nn.AdaptiveAvgPool2d: f"a sum of quantized values; {_NEXT}",
}


def converted(call: Call, module: nn.Module, plan: ConversionPlan) -> tuple[nn.Module | None, str] | None:
    """Return the replacement of a module and its note, or None for a container without a note.

    Args:
        call: how the network calls the module.
        module: a module of the network; one that computes products itself may be changed in place.
        plan: the settings.

    Returns:
        The replacement (the module itself if it was changed in place, None if it stays float), and a note that says how
        it is quantized or why it stays float.

    Raises:
        UsageError: the module cannot be quantized with these settings.
    """
    if call.products:
        if all(plan.stays_float(product) and not product.is_sum for product in call.products):
            exclude_products(module)
            return None, _left_float(call.products)
        if type(module) in PLAIN_LAYERS and len(call.products) > 1:
            raise UsageError(
                f"{call.name or 'the network'} has a hook that computes {call.products[1].name}, which would stay "
                "float: compute it in the forward of a module"
            )
        if type(module) in PLAIN_LAYERS:
            return _layer(call.products[0], module, plan), _layer_note(call.products[0], module, plan)
        return _with_products(call, module, plan), "; ".join(_product_note(p, plan) for p in call.products)
    if type(module) in (nn.ReLU, nn.ReLU6):
        return _activation(call, module, plan)
    if type(module) in _GATES:
        min_bits = WIDE_BITS if plan.residual == "8bit" else 0
        gate = SwitchableGate(module, plan.activation(signed=False, min_bits=min_bits))
        return gate, "gate, unsigned, per tensor" + _at_least(min_bits)
    if type(module) in BATCH_NORMS:
        return _norm(module, plan)
    if isinstance(module, nn.TransformerEncoderLayer):
        # Its fused kernel would read the weights of its layers directly, without their quantizers.
        return _with_products(call, module, plan), "has its layers run, not PyTorch's fused kernel, below 32 bit"
    if any(True for _ in module.children()):
        return None
    return None, _float_note(module)


def _left_float(products: list[Product]) -> str:
    if products[0].is_sum:
        return "stays float: adds something that is the same for every image"
    if all(product.is_constant for product in products):
        return "stays float: the same for every image, and so a constant"
    return "stays float: first or last layer with first_last=float"


def _activation(call: Call, module: nn.Module, plan: ConversionPlan) -> tuple[nn.Module, str]:
    stream, end = plan.is_wide_stream(call.name), plan.is_wide_end(call.name)
    min_bits = WIDE_BITS if stream or end else 0
    why = ", residual stream" if stream else ", read by the last layer" if end else ""
    if others := sorted(plan.probe.joined_with(call.name) - {call.name}):
        why += f", one quantizer with {first_names(others)}"
    if isinstance(module, nn.ReLU6):
        quant = plan.activation(signed=False, min_bits=min_bits, max_threshold=6.0)
        return SwitchableReLU6(act_quant=quant), "unsigned, per tensor, at most 6" + why + _at_least(min_bits)
    return SwitchableReLU(
        act_quant=plan.activation(signed=False, min_bits=min_bits)
    ), "unsigned, per tensor" + why + _at_least(min_bits)


def _norm(module: nn.Module, plan: ConversionPlan) -> tuple[nn.Module | None, str]:
    assert isinstance(module, BatchNorm)
    if not module.track_running_stats:
        return None, "stays float: has no running statistics"
    own_affine = plan.norm == "switchable"
    what = "statistics and affine" if own_affine else "statistics"
    return SwitchableBatchNorm(module, plan.switch, own_affine=own_affine), f"float, {what} per precision"


def _float_note(module: nn.Module) -> str:
    if (note := _FLOAT_NOTES.get(type(module))) is not None:
        return f"stays float: {note}"
    if any(name.startswith("running_") for name, _ in module.named_buffers()):
        return f"stays float: no rule for {type(module).__name__}, whose statistics all precisions share"
    return f"stays float: computes no products; {_NEXT}"


def _layer(product: Product, module: nn.Module, plan: ConversionPlan) -> nn.Module:
    assert isinstance(module, nn.Conv2d | nn.Linear)
    shape = plan.weight_shape(module.weight.shape, linear=isinstance(module, nn.Linear))
    read, _ = product.operands
    input_quant = None if plan.is_quantized(read, product) else plan.operand(read, product)
    weight_quant = plan.weight(shape, min_bits=plan.min_bits(product))
    return brevitas_twin(module, SwitchableConv2d, SwitchableLinear, weight_quant=weight_quant, input_quant=input_quant)


def _layer_note(product: Product, module: nn.Module, plan: ConversionPlan) -> str:
    assert isinstance(module, nn.Conv2d | nn.Linear)
    shape = plan.weight_shape(module.weight.shape, linear=isinstance(module, nn.Linear))
    per = "group" if len(shape) > module.weight.dim() else "channel" if shape[0] > 1 else "tensor"
    note = f"weights per {per}"
    read, _ = product.operands
    if not plan.is_quantized(read, product):
        note += f", own {_kind(read, plan)} input quantizer"
    return note + _at_least(plan.min_bits(product))


def _with_products(call: Call, module: nn.Module, plan: ConversionPlan) -> nn.Module:
    if plan.activations == "dynamic" and isinstance(module, nn.MultiheadAttention):
        raise UsageError(
            f"{call.name or 'the network'} is a MultiheadAttention, in which each token holds all images: dynamic "
            "quantizers could not measure a range for each; use activations='static', or timm's network of the kind"
        )
    products = [_quantized_product(product, plan) for product in call.products]
    quantize_products(module, ProductQuant(products, plan.switch))
    return module


def _quantized_product(product: Product, plan: ConversionPlan) -> QuantizedProduct:
    kind = QuantizedAttention if product.name == ATTENTION else QuantizedProduct
    if product.is_sum:
        return QuantizedSum({} if plan.stays_float(product) else _quantizers_of_sum(product, plan))
    if plan.stays_float(product):
        return QuantizedProduct(product.name, {})
    quantizers = _quantizers_of_operands(product, plan)
    if product.name == ATTENTION:
        shape, min_bits = plan.head_shape(product), plan.min_bits(product)
        quant = plan.activation(signed=False, min_bits=min_bits, function=SOFTMAX, shape=shape)
        quantizers["probabilities"] = SwitchableIdentity(quant)
    return kind(product.name, quantizers)


def _quantizers_of_sum(product: Product, plan: ConversionPlan) -> dict[str, nn.Module]:
    if plan.quantizes_once:
        return _quantizers_of_operands(product, plan)
    return {"both": SwitchableIdentity(plan.activation(signed=True, min_bits=plan.min_bits(product)))}


def _quantizers_of_operands(product: Product, plan: ConversionPlan) -> dict[str, nn.Module]:
    return {
        operand.label: SwitchableIdentity(_operand_quant(operand, product, plan))
        for operand in product.operands
        if not plan.is_quantized(operand, product)
    }


def _operand_quant(operand: Operand, product: Product, plan: ConversionPlan) -> Any:
    if not _is_weight(operand, product):
        return plan.operand(operand, product)
    # A filter that is not learned, as in a blur pool, was not made for few levels.
    min_bits = plan.min_bits(product) if operand.parameters else WIDE_BITS
    shape = (operand.shape[0], *(1,) * (len(operand.shape) - 1)) if plan.is_per_channel(product) else ()
    return plan.computed_weight(shape, min_bits=min_bits)


def _is_weight(operand: Operand, product: Product) -> bool:
    return operand.fixed and product.name != ATTENTION


def _product_note(product: Product, plan: ConversionPlan) -> str:
    if plan.stays_float(product):
        return f"{product.name} {_left_float([product])}"
    if product.is_sum and not plan.quantizes_once:
        return f"both sides of a sum by one signed quantizer{_at_least(plan.min_bits(product))}"
    parts = [_operand_note(operand, product, plan) for operand in product.operands]
    if product.name == ATTENTION:
        parts.insert(2, f"unsigned{_scheme(SOFTMAX, plan)} probabilities")
    heads = " per head" if plan.head_shape(product) else ""
    name = "sum" if product.is_sum else product.name
    return f"{name} of {', '.join(parts)}{heads}{_at_least(plan.min_bits(product))}"


def _operand_note(operand: Operand, product: Product, plan: ConversionPlan) -> str:
    if plan.is_quantized(operand, product):
        return f"quantized {operand.label}"
    if _is_weight(operand, product):
        return f"{operand.label} {'per channel' if plan.is_per_channel(product) else 'per tensor'}"
    return f"{_kind(operand, plan)} {operand.label}"


def _kind(operand: Operand, plan: ConversionPlan) -> str:
    return ("unsigned" if operand.nonnegative else "signed") + _scheme(operand.function, plan)


def _scheme(function: str | None, plan: ConversionPlan) -> str:
    """Return the name of the quantizer of a function's values where it has one of its own."""
    quantizer = plan.quantizers_after.get(function or "")
    return "" if quantizer is None else f" {type(quantizer).__name__}"


def _at_least(min_bits: int) -> str:
    return ", at least 8 bit" if min_bits == WIDE_BITS else ""
