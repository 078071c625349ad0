"""A float network to a switchable one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qadtr_brevitas.errors import UsageError
from qadtr_brevitas.precision import DEFAULT_BITS, FLOAT_BITS, MIN_BITS, PrecisionLike, parse_precisions
from qadtr_brevitas.quant.conversion_report import ConversionReport, LayerReport
from qadtr_brevitas.quant.layers import (
    SwitchableConv2d,
    SwitchableLinear,
    SwitchableReLU,
    SwitchableReLU6,
    brevitas_twin,
)
from qadtr_brevitas.quant.model import SwitchableModel
from qadtr_brevitas.quant.norm import SwitchableBatchNorm2d
from qadtr_brevitas.quant.probe import Call, probe
from qadtr_brevitas.quant.quantizers import EDGE_BITS, act_injector, weight_injector
from qadtr_brevitas.quant.switch import Switch

Edge = Literal["8bit", "same", "float"]
Residual = Literal["8bit", "same"]
Norm = Literal["statistics", "switchable"]

_LINEAR = (nn.Conv2d, nn.Linear)
_EXACT_ON_INTEGERS = {
    nn.MaxPool2d: "passes values through",
    nn.AdaptiveMaxPool2d: "passes values through",
    nn.Flatten: "passes values through",
    nn.Identity: "passes values through",
    nn.Dropout: "passes values through at inference",
    nn.AvgPool2d: "a sum of quantized values; its result is quantized where the next layer needs it",
    nn.AdaptiveAvgPool2d: "a sum of quantized values; its result is quantized where the next layer needs it",
}


@dataclass(frozen=True)
class _Plan:
    switch: Switch
    edge: Edge
    residual: Residual
    norm: Norm
    narrow_range: bool
    per_channel: bool
    first: str
    last: str
    streams: frozenset[str]

    def min_bits(self, name: str) -> int:
        wide = (self.edge == "8bit" and name in (self.first, self.last)) or self.is_wide_stream(name)
        return EDGE_BITS if wide else MIN_BITS

    def is_wide_stream(self, name: str | None) -> bool:
        return self.residual == "8bit" and name in self.streams

    def stays_float(self, name: str) -> bool:
        return self.edge == "float" and name in (self.first, self.last)

    def weight_bits(self) -> tuple[int, ...]:
        return tuple(p.weight for p in self.switch.allowed if p.weight != FLOAT_BITS)

    def act_bits(self) -> tuple[int, ...]:
        return tuple(p.act for p in self.switch.allowed if p.act != FLOAT_BITS)


def convert(
    model: nn.Module,
    precisions: Sequence[PrecisionLike] = DEFAULT_BITS,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: tuple[int, int] | None = None,
    edge: Edge = "8bit",
    residual: Residual = "8bit",
    norm: Norm = "statistics",
    narrow_range: bool = True,
    per_channel: bool = True,
) -> tuple[SwitchableModel, ConversionReport]:
    """Makes a switchable model of a float network, which is left untouched.

    Weights of Conv2d and Linear are quantized per output channel, symmetric; ReLU and ReLU6 become unsigned
    per-tensor quantizers; a Conv2d or Linear whose input is not a quantized activation (the image, a residual sum,
    an average pool) gets an input quantizer. Residual sums and pools are computed in float, as in accumulators wide
    enough. An activation that goes on to a residual sum (the residual stream) keeps 8 bit or more, and the
    convolutions that read it quantize it further: at 2 bit the stream would otherwise be cut to 4 levels in every
    block. Thresholds are 1 until `calibrate()` or training sets them.

    Args:
        model: a float network of images, in any mode and on any device.
        precisions: the precisions to switch between; the first one is in force at the start.
        mean: per channel of pixels in [0, 1]; by default the model's own (timm's pretrained_cfg), else 0.
        std: likewise, else 1.
        image_size: height and width of images; by default the model's own.
        edge: first and last layer at 8 bit or more, at the same precision as the others, or float.
        residual: residual streams at 8 bit or more, or at the same precision as the others.
        norm: running statistics per precision with a shared affine, or a whole BatchNorm per precision.
        narrow_range: symmetric weight levels (ternary at 2 bit); otherwise one more level below.
        per_channel: a weight threshold per output channel, or one for all.

    Returns:
        The switchable model, on the device of the float one, and what was done to every layer.

    Raises:
        UsageError: a precision that is not possible, nothing to quantize, or a network that does not run.
    """
    net = copy.deepcopy(model)
    switch = Switch(parse_precisions(precisions))
    config = _image_config(net, mean, std, image_size)
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    calls = probe(net, _noise(config).to(device))
    modules = dict(net.named_modules())
    linear = [name for name in calls if type(modules[name]) in _LINEAR]
    if not linear:
        raise UsageError(
            f"{type(model).__name__} has nothing to quantize: no plain Conv2d or Linear layer runs on an image"
        )
    streams = frozenset(call.name for call in calls.values() if call.feeds_sum)
    plan = _Plan(switch, edge, residual, norm, narrow_range, per_channel, linear[0], linear[-1], streams)
    reports = [_convert_layer(net, call, modules[name], plan) for name, call in calls.items()]
    switchable = SwitchableModel(net, switch, mean=config["mean"], std=config["std"]).to(device)
    switchable.train(model.training)
    return switchable, ConversionReport(tuple(reports))


def _image_config(
    net: nn.Module,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    image_size: tuple[int, int] | None,
) -> dict[str, Any]:
    own = getattr(net, "pretrained_cfg", None) or {}
    channels, *own_size = own.get("input_size", (3, 224, 224))
    return {
        "mean": tuple(mean or own.get("mean", (0.0,) * channels)),
        "std": tuple(std or own.get("std", (1.0,) * channels)),
        "size": (channels, *(image_size or own_size)),
    }


def _noise(config: dict[str, Any]) -> Tensor:
    """Two normalized images of pixel noise, (2, C, H, W)."""
    pixels = torch.rand(2, *config["size"], generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(config[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    return (pixels - mean) / std


def _convert_layer(net: nn.Module, call: Call, module: nn.Module, plan: _Plan) -> LayerReport:
    replacement, note = _replacement(call, module, plan)
    if replacement is not None:
        replacement.train(module.training)
        net.set_submodule(call.name, replacement)
    if replacement is not None and call.count > 1:
        note += f"; shared by {call.count} places"
    parameters = sum(p.numel() for p in module.parameters())
    quantized = replacement is not None and type(module) is not nn.BatchNorm2d
    return LayerReport(call.name, type(module).__name__, quantized, note, parameters)


def _replacement(call: Call, module: nn.Module, plan: _Plan) -> tuple[nn.Module | None, str]:
    kind = type(module)
    if kind in _LINEAR:
        if plan.stays_float(call.name):
            return None, "stays float: first or last layer with edge=float"
        return _quantized_linear(call, module, plan), _linear_note(call, plan)
    if kind is nn.ReLU:
        quant = _activation(plan, signed=False, min_bits=plan.min_bits(call.name))
        return SwitchableReLU(act_quant=quant), "unsigned, per tensor" + _stream_note(call, plan)
    if kind is nn.ReLU6:
        quant = _activation(plan, signed=False, min_bits=plan.min_bits(call.name), max_threshold=6.0)
        return SwitchableReLU6(act_quant=quant), "unsigned, per tensor, at most 6" + _stream_note(call, plan)
    if kind is nn.BatchNorm2d and isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
        own_affine = plan.norm == "switchable"
        what = "statistics and affine" if own_affine else "statistics"
        return SwitchableBatchNorm2d(module, plan.switch, own_affine=own_affine), f"float, {what} per precision"
    if kind in _EXACT_ON_INTEGERS:
        return None, f"stays float: {_EXACT_ON_INTEGERS[kind]}"
    return None, f"stays float: no rule for {kind.__name__}"


def _stream_note(call: Call, plan: _Plan) -> str:
    return ", residual stream, at least 8 bit" if plan.is_wide_stream(call.name) else ""


def _reads_quantized(call: Call, plan: _Plan) -> bool:
    return call.source is not None and not plan.is_wide_stream(call.source)


def _linear_note(call: Call, plan: _Plan) -> str:
    granularity = "per channel" if plan.per_channel else "per tensor"
    note = f"weights {granularity}"
    if not _reads_quantized(call, plan):
        note += f", own {'unsigned' if call.nonnegative_input else 'signed'} input quantizer"
    if plan.min_bits(call.name) == EDGE_BITS:
        note += ", at least 8 bit"
    return note


def _activation(plan: _Plan, *, signed: bool, min_bits: int, max_threshold: float | None = None) -> Any:
    return act_injector(
        plan.switch, bits=plan.act_bits(), min_bits=min_bits, signed=signed, max_threshold=max_threshold
    )


def _quantized_linear(call: Call, module: nn.Module, plan: _Plan) -> nn.Module:
    assert isinstance(module, nn.Conv2d | nn.Linear)
    min_bits = plan.min_bits(call.name)
    shape = (module.weight.shape[0] if plan.per_channel else 1, *(1,) * (module.weight.dim() - 1))
    weight_quant = weight_injector(
        plan.switch, bits=plan.weight_bits(), min_bits=min_bits, narrow_range=plan.narrow_range, shape=shape
    )
    input_quant = None
    if not _reads_quantized(call, plan):
        input_quant = _activation(plan, signed=not call.nonnegative_input, min_bits=min_bits)
    return brevitas_twin(module, SwitchableConv2d, SwitchableLinear, weight_quant=weight_quant, input_quant=input_quant)
