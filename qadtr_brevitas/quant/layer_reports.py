"""What `convert()` reports of layers and of parameters outside of them, and how many bytes a network takes."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from torch import nn

from qadtr_brevitas.core.layer_bits import MixedPrecision
from qadtr_brevitas.core.precision import FLOAT_BITS, Precision
from qadtr_brevitas.quant.conversion_report import LayerReport
from qadtr_brevitas.quant.feature_clip import feature_clips
from qadtr_brevitas.quant.mixed import WHOLE
from qadtr_brevitas.quant.plan import ConversionPlan
from qadtr_brevitas.quant.probe import Call, Probe
from qadtr_brevitas.quant.rules import PLAIN_LAYERS


def layer_report(call: Call, module: nn.Module, note: str, plan: ConversionPlan, *, quantized: bool) -> LayerReport:
    """Return what was done to a module that runs, with its parameters and multiply-accumulates."""
    parameters = sum(p.numel() for p in module.parameters(recurse=False))
    kept = [product for product in call.products if not plan.stays_float(product)]
    weights = {
        name.rpartition(".")[0] for product in kept for operand in product.operands for name in operand.parameters
    }
    return LayerReport(
        call.name or "network",
        type(module).__name__,
        quantized,
        note,
        parameters,
        parameters if call.name in weights else 0,
        # Products that are the same for every image are not computed at inference.
        sum(product.macs for product in call.products if not product.is_constant),
        sum(product.macs for product in kept),
    )


def loose_parameters(name: str, module: nn.Module) -> Iterator[LayerReport]:
    """Yield parameters of a container: position embeddings, class tokens, scales of branches."""
    for own, parameter in module.named_parameters(recurse=False):
        note = "stays float: added, joined or multiplied elementwise"
        yield LayerReport(f"{name}.{own}".strip("."), "Parameter", False, note, parameter.numel())


def uncalled_layers(modules: dict[str, nn.Module], found: Probe) -> Iterator[LayerReport]:
    """Yield modules with parameters whose forward does not run."""
    readers = {
        parameter: product.owner
        for product in found.products
        for operand in product.operands
        for parameter in operand.parameters
    }
    for name, module in modules.items():
        own = dict(module.named_parameters(name, recurse=False))
        if name in found.calls or not own:
            continue
        reader = next((readers[parameter] for parameter in own if parameter in readers), None)
        is_read = reader is not None
        note = (
            f"its weight is quantized in {reader or 'the network itself'}" if is_read else "stays float: does not run"
        )
        count = sum(parameter.numel() for parameter in own.values())
        yield LayerReport(name, type(module).__name__, is_read, note, count, count if is_read else 0)


def clip_reports(model: nn.Module) -> Iterator[LayerReport]:
    """Yield the clips of feature norms."""
    for clip in feature_clips(model):
        note = f"clips norms at their percentile {clip.percentile:g}"
        yield LayerReport(f"{clip.name} (clip)", "FeatureClip", False, note, 0)


def packed_size(net: nn.Module, plan: ConversionPlan, precision: Precision, mixed: MixedPrecision | None) -> int:
    """Return the bytes of a network with packed weights at a precision, and a scale for each of their thresholds."""
    total = sum(x.numel() * x.element_size() for x in (*net.parameters(), *net.buffers()))
    counted: set[str] = set()
    for product in plan.probe.products:
        is_layer = type(net.get_submodule(product.owner)) in PLAIN_LAYERS
        for operand in product.operands:
            key = "/".join(sorted(operand.parameters))
            bits = precision.weight if mixed is None else mixed.weight(product.owner or WHOLE) or FLOAT_BITS
            if plan.stays_float(product) or not key or key in counted or bits == FLOAT_BITS:
                continue
            counted.add(key)
            own_bits = max(bits, plan.min_bits(product))
            scales = plan.thresholds(product, operand, is_layer=is_layer)
            total += (prod(operand.shape) * (own_bits - FLOAT_BITS)) // 8 + 4 * scales
    return total
