"""Bias correction: layers keep the mean outputs of the float network (Nagel et al. 2019, section 4.2).

Quantization shifts the mean output of a channel, and the shifts add up from layer to layer. At each precision, each
convolution and linear layer therefore adds a constant per channel that is measured on images.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.quant.layers import BiasCorrection, SwitchableConv2d, SwitchableLinear
from qadtr_brevitas.quant.products import products_not_intercepted
from qadtr_brevitas.quant.switch import (
    allowed_precisions,
    at_precision,
    evaluating,
    frozen_weights,
    switch_of,
)

Layer = SwitchableConv2d | SwitchableLinear
# By layer, in the order of its calls: the mean output per channel, (out,), and the number of images it was taken over.
OutputMeans = dict[Layer, list[tuple[Tensor, int]]]


def add_bias_correction(model: nn.Module) -> None:
    """Add a bias correction of 0 to every convolution and linear layer that has none, in place."""
    for layer in _layers(model):
        if layer.bias_correction is None:
            layer.bias_correction = BiasCorrection(switch_of(model), layer.weight.detach().flatten(1)[:, 0])


def reset_bias_correction(model: nn.Module) -> None:
    """Set every bias correction to 0, in place."""
    for module in model.modules():
        if isinstance(module, BiasCorrection):
            for offset in module.buffers():
                offset.zero_()


def corrected_precisions(model: nn.Module) -> list[Precision]:
    """Return the precisions that biases are corrected for: all below 32."""
    return [precision for precision in allowed_precisions(model) if not precision.is_float]


@contextmanager
def output_means(model: nn.Module, *, enabled: bool = True) -> Generator[OutputMeans]:
    """Collect the mean outputs of all layers for the duration of a block, unless disabled."""
    means: OutputMeans = {layer: [] for layer in _layers(model)} if enabled else {}

    def note(layer: Layer, _: object, y: Tensor) -> None:
        means[layer].append((_channel_means(layer, y), len(y)))

    with _hooked(means, note):
        yield means


def correct_biases(
    model: nn.Module, batches: Iterable[Tensor], means: OutputMeans, count_batch: Callable[[], object]
) -> None:
    """Measure the bias corrections of every precision, in place.

    Within each batch the output of each layer is shifted at once, so that later layers see corrected inputs. A
    correction is the mean of these shifts over all images: exact on one batch, close on many.

    Args:
        model: a calibrated switchable model whose bias corrections are 0.
        batches: the images that `means` were taken on, in the same order.
        means: mean outputs of the float network.
        count_batch: called after each batch.
    """
    add_bias_correction(model)
    for precision in corrected_precisions(model):
        # One block per precision, so that quantized weights of one precision only are in memory.
        with evaluating(model), at_precision(model, precision), frozen_weights(model), _shifting(means) as shifts:
            for images in batches:
                model(images)
                count_batch()
        for layer, found in shifts.items():
            assert layer.bias_correction is not None
            offset = layer.bias_correction.offset(precision)
            images = torch.tensor([count for _, count in means[layer]], dtype=offset.dtype, device=offset.device)
            offset.copy_(torch.stack(found, dim=1) @ images / images.sum())


@contextmanager
def _shifting(means: OutputMeans) -> Generator[dict[Layer, list[Tensor]]]:
    """Shift every output to its mean in the float network, and collect the shifts, (out,) each."""
    shifts: dict[Layer, list[Tensor]] = {layer: [] for layer, found in means.items() if found}

    def shift(layer: Layer, _: object, y: Tensor) -> Tensor:
        mean, _ = means[layer][len(shifts[layer])]
        shifts[layer].append(mean - _channel_means(layer, y))
        return y + shifts[layer][-1].view(-1, *(1,) * (y.dim() - 2 if isinstance(layer, SwitchableConv2d) else 0))

    with _hooked(shifts, shift):
        yield shifts


@contextmanager
def _hooked(layers: Iterable[Layer], hook: Callable[[Layer, object, Tensor], Tensor | None]) -> Generator[None]:
    def hidden_hook(layer: Layer, args: object, y: Tensor) -> Tensor | None:
        # The hook's own products and sums are not part of a module that quantizes its own.
        with products_not_intercepted():
            return hook(layer, args, y)

    handles = [layer.register_forward_hook(hidden_hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layers(model: nn.Module) -> list[Layer]:
    return [module for module in model.modules() if isinstance(module, SwitchableConv2d | SwitchableLinear)]


def _channel_means(layer: Layer, y: Tensor) -> Tensor:
    """Return the mean of each output channel, (out,): dimension 1 of a convolution's output, the last of a linear's."""
    channel = 1 if isinstance(layer, SwitchableConv2d) else y.dim() - 1
    return y.mean([d for d in range(y.dim()) if d != channel])
