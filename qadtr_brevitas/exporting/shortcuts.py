"""Shortcuts without weights, as convolutions: compilers know these, and no slices and padded channels."""

from __future__ import annotations

from typing import Any

import torch
from brevitas.inject.enum import ScalingImplType
from brevitas.nn import QuantConv2d
from brevitas.quant import Int8WeightPerTensorFloat
from torch import Tensor, nn

from qadtr_brevitas.models.cifar import PaddedShortcut
from qadtr_brevitas.quant.products import exclude_products


def replace_shortcuts(frozen: nn.Module, image: Tensor) -> None:
    """Replace every PaddedShortcut by a 1x1 convolution of stride 2 with weights 0 and 1, in place; it is exact.

    Args:
        frozen: a frozen model.
        image: what it takes, (1, C, H, W).
    """
    channels: dict[nn.Module, int] = {}

    def note(module: nn.Module, given: tuple[Tensor]) -> None:
        channels[module] = given[0].shape[1]

    shortcuts = {name: module for name, module in frozen.named_modules() if isinstance(module, PaddedShortcut)}
    handles = [module.register_forward_pre_hook(note) for module in shortcuts.values()]
    with torch.no_grad():
        frozen(image)
    for handle in handles:
        handle.remove()
    for name, module in shortcuts.items():
        frozen.set_submodule(name, _convolution(channels[module], module.padding))


def _convolution(channels: int, padding: int) -> nn.Module:
    stock: Any = Int8WeightPerTensorFloat
    # Two bits in narrow range are -1, 0 and 1, with a step of 1.
    quant = stock.let(bit_width=2, narrow_range=True, scaling_impl_type=ScalingImplType.CONST, scaling_init=1.0)
    conv = QuantConv2d(channels, channels + 2 * padding, 1, stride=2, bias=False, weight_quant=quant)
    weight = torch.zeros_like(conv.weight)
    weight[range(padding, padding + channels), range(channels)] = 1
    conv.weight = nn.Parameter(weight)
    exclude_products(conv)
    return conv.eval()
