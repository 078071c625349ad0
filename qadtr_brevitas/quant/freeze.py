"""Freezing: a switchable model at one precision as a plain Brevitas model, which exporters take."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from brevitas.inject.enum import ScalingImplType
from brevitas.nn import QuantConv2d, QuantIdentity, QuantLinear, QuantReLU
from brevitas.quant import (
    Int8ActPerTensorFloat,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFloat,
    Uint8ActPerTensorFloat,
)
from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError, first_names
from qadtr_brevitas.core.precision import PrecisionLike
from qadtr_brevitas.quant.feature_clip import FeatureClip, feature_clips
from qadtr_brevitas.quant.layers import (
    SwitchableConv2d,
    SwitchableGate,
    SwitchableIdentity,
    SwitchableLinear,
    SwitchableReLU,
    SwitchableReLU6,
    brevitas_twin,
    keep_hooks,
)
from qadtr_brevitas.quant.model import SwitchableModel, normalize
from qadtr_brevitas.quant.norm import SwitchableBatchNorm
from qadtr_brevitas.quant.products import QuantizedFunctions, exclude_products, restore_products
from qadtr_brevitas.quant.proxies import SwitchableActProxy, SwitchableWeightProxy, act_injector
from qadtr_brevitas.quant.quantizer import SMALLEST_THRESHOLD
from qadtr_brevitas.quant.switch import Switch, at_precision
from qadtr_brevitas.quant.switchable_quant import SwitchableQuant, SwitchableWeightQuant

# Where quantizers hang in the layers that they belong to.
_QUANTIZERS = ("product_quant", "input_quant", "weight_quant", "act_quant")


class FrozenModel(nn.Module):
    """A plain Brevitas network with its normalization: images (N, C, H, W) in [0, 1] to logits."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: Tensor, std: Tensor, switch: Switch, clips: list[FeatureClip]) -> None:
        super().__init__()
        self.net = net
        self._switch = switch
        # Hooks of the network call them.
        self.feature_clips = nn.ModuleList(clips)
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    def forward(self, images: Tensor) -> Tensor:
        # Dynamic quantizers need it to find the values of each image.
        self._switch.images = len(images)
        return self.net(normalize(images, self.mean, self.std))


@torch.inference_mode(False)
def freeze(model: SwitchableModel, precision: PrecisionLike) -> FrozenModel:
    """Return a copy of a switchable model at one precision, of stock Brevitas layers and quantizers only.

    The copy computes what the switchable model computes at that precision, with one BatchNorm per layer. Bias
    corrections become part of the biases. Dynamic quantizers remain those of this package: Brevitas has none with a
    range per image.

    Args:
        model: a switchable model, which is not changed.
        precision: an allowed precision. At 32 bit the copy is the float network.

    Returns:
        The frozen model, in eval mode: images (N, C, H, W) in [0, 1] to logits (N, classes).

    Raises:
        UsageError: the precision is not allowed, the model is not switchable, or a quantizer has levels or a
            granularity that Brevitas's own quantizers lack.
    """
    with at_precision(model, precision):
        _check_stock(model)
        copied = copy.deepcopy(model)
        replacements: dict[nn.Module, nn.Module | None] = {}
        for name, module in list(copied.named_modules(remove_duplicate=False)):
            if module not in replacements:
                replacements[module] = _frozen_layer(module)
                if (replacement := replacements[module]) is not None:
                    keep_hooks(module, replacement)
            if (replacement := replacements[module]) is not None:
                copied.set_submodule(name, replacement)
        for module in list(copied.modules()):
            if isinstance(module, QuantizedFunctions):
                _freeze_products(module)
        _exclude_stock_layers(copied.net)
        frozen = FrozenModel(copied.net, copied.mean, copied.std, copied.switch, feature_clips(copied))
        return frozen.to(copied.mean.device).eval()


def _check_stock(model: nn.Module) -> None:
    """Refuse levels and granularities that Brevitas's own quantizers lack, by layer."""
    quantizers = {name: m for name, m in model.named_modules() if isinstance(m, SwitchableQuant) and m.is_active}
    odd = {name: each for name, each in quantizers.items() if not each.scheme.has_stock_levels and not each.dynamic}
    if odd:
        kinds = sorted({type(each.scheme).__name__ for each in odd.values()})
        raise UsageError(
            f"{' and '.join(kinds)} levels cannot be frozen ({_places(odd)}): Brevitas's own quantizers, and so all "
            "export formats, have uniform levels only; convert with the quantizer 'uniform' or 'power-of-two' (and "
            "without softmax_quantizer and gelu_quantizer) to export"
        )
    grouped = [
        name
        for name, each in quantizers.items()
        if each.scheme.granularity == "group" and isinstance(each, SwitchableWeightQuant)
    ]
    if grouped:
        raise UsageError(
            f"weights with a threshold per group cannot be frozen ({_places(grouped)}): no export format has them; "
            "convert with granularity 'channel' to export"
        )


def _places(quantizers: Iterable[str]) -> str:
    """Return the layers of some quantizers, of which module names are given: the first ones, and how many more."""
    return first_names(list(dict.fromkeys(_layer_of(name) for name in quantizers)))


def _layer_of(name: str) -> str:
    parts = name.split(".")
    end = next((index for index, part in enumerate(parts) if part in _QUANTIZERS), len(parts))
    return ".".join(parts[1:end]) or "the network"


def _exclude_stock_layers(net: nn.Module) -> None:
    """Exclude stock layers inside modules that quantize their own products from the interception of these."""
    outer = [module for module in net.modules() if isinstance(module, QuantizedFunctions)]
    for layer in {layer for module in outer for layer in module.modules()}:
        if isinstance(layer, QuantConv2d | QuantLinear | QuantReLU | QuantIdentity):
            exclude_products(layer)


def _frozen_layer(module: nn.Module) -> nn.Module | None:
    if isinstance(module, SwitchableConv2d | SwitchableLinear):
        return _frozen_linear(module)
    if isinstance(module, SwitchableReLU):
        quant = _act_quant(module.act_quant)
        if quant is None:
            return nn.ReLU6() if isinstance(module, SwitchableReLU6) else nn.ReLU()
        return QuantReLU(act_quant=quant)
    if isinstance(module, SwitchableIdentity):
        return _frozen_identity(module)
    if isinstance(module, SwitchableGate):
        quant = _act_quant(module.quant.act_quant)
        return module.gate if quant is None else nn.Sequential(module.gate, QuantIdentity(act_quant=quant))
    if isinstance(module, SwitchableBatchNorm):
        return module.frozen()
    return None


def _frozen_linear(module: SwitchableConv2d | SwitchableLinear) -> nn.Module:
    input_quant = _act_quant(module.input_quant) if isinstance(module.input_quant, SwitchableActProxy) else None
    if module.bias_correction is not None:
        bias = module.bias_correction(module.bias, module.bias_correction.switch.precision)
        module.bias = None if bias is None else nn.Parameter(bias.detach())
    proxy = module.weight_quant
    if proxy.is_quant_enabled and proxy.quantizer.rounding is not None:
        # Rounded to the nearest level, they stay as they are.
        module.weight = nn.Parameter(proxy.quantizer.quantize(module.weight).detach())
    return brevitas_twin(
        module, QuantConv2d, QuantLinear, weight_quant=_weight_quant(module.weight_quant), input_quant=input_quant
    )


def _freeze_products(module: QuantizedFunctions) -> None:
    """Quantize the module's products always, or never; their quantizers are replaced one by one."""
    if module.product_quant.is_active:
        module.product_quant.switch = None
    else:
        restore_products(module)


def _frozen_identity(module: SwitchableIdentity) -> nn.Module:
    quantizer = module.act_quant.quantizer
    if not isinstance(quantizer, SwitchableWeightQuant):
        quant = _act_quant(module.act_quant)
    elif not quantizer.is_active:
        quant = None
    else:
        stock: Any = Int8ActPerTensorFloat
        quant = stock.let(narrow_range=quantizer.narrow_range, **_settings(quantizer), **_per_channel(quantizer))
    return nn.Identity() if quant is None else QuantIdentity(act_quant=quant)


def _weight_quant(proxy: SwitchableWeightProxy) -> Any:
    if not proxy.is_quant_enabled:
        return None
    stock: Any = Int8WeightPerChannelFloat if proxy.per_channel else Int8WeightPerTensorFloat
    return stock.let(narrow_range=proxy.quantizer.narrow_range, **_settings(proxy.quantizer))


def _act_quant(proxy: SwitchableActProxy) -> Any:
    if not proxy.is_quant_enabled:
        return None
    quantizer = proxy.quantizer
    if quantizer.dynamic:
        names = ("min_bits", "signed", "max_threshold", "scheme")
        settings = {name: getattr(quantizer, name) for name in names}
        return act_injector(quantizer.switch, dynamic=True, bits=(quantizer.bits,), **settings)
    stock: Any = Int8ActPerTensorFloat if quantizer.signed else Uint8ActPerTensorFloat
    return stock.let(**_settings(quantizer), **_per_channel(quantizer))


def _per_channel(quantizer: SwitchableQuant) -> dict[str, Any]:
    """Return the settings of an activation quantizer with several thresholds."""
    if not quantizer.shape:
        return {}
    return {"scaling_per_output_channel": True, "per_channel_broadcastable_shape": quantizer.shape}


def _settings(quantizer: SwitchableQuant) -> dict[str, Any]:
    threshold = quantizer.threshold(quantizer.bits).detach().clone()
    return {
        "bit_width": quantizer.bits,
        "scaling_impl_type": ScalingImplType.PARAMETER,
        "scaling_min_val": SMALLEST_THRESHOLD,
        "scaling_init": threshold if threshold.numel() > 1 else float(threshold),
    }
