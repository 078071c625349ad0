"""Which convolutions of a switchable model are convolutions of integers, and of which."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.quant.frozen import version_of
from qadtr_brevitas.quant.integer_conv import LARGEST_INPUT, LARGEST_WEIGHT, ZERO_OF_SIGNED, sums_are_exact
from qadtr_brevitas.quant.layers import SwitchableConv2d, switchable_layers
from qadtr_brevitas.quant.proxies import SwitchableActProxy
from qadtr_brevitas.quant.switch import SwitchState, observing, switch_of
from qadtr_brevitas.quant.switchable_quant import SwitchableActQuant
from qadtr_brevitas.quant.tensor_levels import IntegerProduct, TensorLevels

_LARGEST_SUM = 2**31 - 1


@torch.no_grad()
def integer_products(model: nn.Module, images: Tensor, acts: dict[int, TensorLevels]) -> dict[int, IntegerProduct]:
    """Return the convolutions that can be computed with integers at the current precision, by the id of the layer.

    A convolution can whose input comes from one quantizer of at most 256 equally spaced levels, and whose weight has a
    step for each output channel or one for all.

    Args:
        model: a switchable model in evaluation mode, on a CPU.
        images: (N, C, H, W) in [0, 1], a few. They show which quantizer each convolution reads.
        acts: the levels of each quantizer of activations, by its id, as in `Prepared`.
    """
    if images.device.type != "cpu" or not sums_are_exact():
        return {}
    now = switch_of(model).states.now
    readers = _quantizers_of_inputs(model, images, now.precision, acts)
    made = {id(conv): _integer_product(conv, acts[id(quantizer)], now) for conv, quantizer in readers.items()}
    return {key: found for key, found in made.items() if found is not None}


def _quantizers_of_inputs(
    model: nn.Module, images: Tensor, precision: Precision, acts: dict[int, TensorLevels]
) -> dict[SwitchableConv2d, SwitchableActQuant]:
    """Return the quantizer whose output each convolution reads unchanged, where there is one, and always the same."""
    # Tensors are kept so that no other one gets their id.
    made: dict[int, tuple[Tensor, int, SwitchableActQuant]] = {}
    read: dict[SwitchableConv2d, set[SwitchableActQuant | None]] = {}

    def is_quantizing(quantizer: object) -> bool:
        return isinstance(quantizer, SwitchableActQuant) and id(quantizer) in acts and quantizer.is_active_at(precision)

    def observe(quantizer: Any, tensor: Tensor) -> Tensor | None:
        if not is_quantizing(quantizer):
            return None
        output = tensor.clone()
        made[id(output)] = output, version_of(output), quantizer
        return output

    def source_of(tensor: Tensor) -> SwitchableActQuant | None:
        _, version, quantizer = made.get(id(tensor), (None, -1, None))
        return quantizer if version_of(tensor) == version else None

    def enter(conv: SwitchableConv2d, inputs: tuple[Tensor, ...]) -> None:
        own = conv.input_quant.quantizer if isinstance(conv.input_quant, SwitchableActProxy) else None
        read.setdefault(conv, set()).add(own if is_quantizing(own) else source_of(inputs[0]))

    convs = [layer for layer in switchable_layers(model).values() if isinstance(layer, SwitchableConv2d)]
    handles = [conv.register_forward_pre_hook(enter) for conv in convs]
    try:
        with observing(model, observe):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    found = {conv: next(iter(sources)) for conv, sources in read.items() if len(sources) == 1}
    return {conv: quantizer for conv, quantizer in found.items() if quantizer is not None}


def _integer_product(conv: SwitchableConv2d, levels: TensorLevels, now: SwitchState) -> IntegerProduct | None:
    """Return what the product is computed with; None where it is not one of 8-bit integers."""
    quantizer = conv.weight_quant.quantizer
    weight, _ = conv.fixed(now)
    is_signed = bool(levels.lo < 0)
    lowest, highest = (-ZERO_OF_SIGNED, ZERO_OF_SIGNED - 1) if is_signed else (0, LARGEST_INPUT)
    fits = bool(levels.lo >= lowest) and bool(levels.hi <= highest)
    is_plain = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    largest = weight[0].numel() * LARGEST_INPUT * LARGEST_WEIGHT
    if not (fits and is_plain and largest <= _LARGEST_SUM) or quantizer.is_grouped(conv.weight):
        return None
    if not quantizer.is_active_at(now.precision):
        return None
    steps = quantizer.scale(quantizer.bits_at(now.precision)).detach().float().reshape(-1, 1, 1, 1)
    rounded = torch.round(weight / steps)
    # Levels that are not multiples of a step, such as powers of two, are no integers.
    fits = bool(rounded.min() >= -LARGEST_WEIGHT) and bool(rounded.max() < LARGEST_WEIGHT)
    if not fits or not torch.allclose(rounded * steps, weight, rtol=1e-5, atol=0):
        return None
    return IntegerProduct(
        levels=rounded.to(torch.int8),
        steps=(steps * levels.step).reshape(1, -1, 1, 1),
        per_step=1 / levels.step,
        zero=ZERO_OF_SIGNED if is_signed else 0,
    )
