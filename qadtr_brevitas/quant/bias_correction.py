"""Bias correction: layers keep the mean outputs of the float network (Nagel et al. 2019, section 4.2).

Quantization shifts the mean output of a channel, and the shifts add up from layer to layer. At each precision, each
convolution and linear layer therefore adds a constant per channel that is measured on images.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from qadtr_brevitas.core.plugin import plugin
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.quant.layers import BiasOffsets, SwitchableConv2d, SwitchableLayer, switchable_layers
from qadtr_brevitas.quant.products import products_not_intercepted
from qadtr_brevitas.quant.ptq import PtqMethod, PtqRun, quantized_precisions
from qadtr_brevitas.quant.switch import at_precision, evaluating, frozen_weights, switch_of


@plugin
class BiasCorrection(PtqMethod):
    """Shift the outputs of layers so that their means per channel are those of the float network.

    Each precision takes one more pass over the images (Nagel et al. 2019, section 4.2, on images).
    """

    def prepare(self, model: nn.Module) -> None:
        for layer in switchable_layers(model).values():
            if layer.bias_correction is None:
                layer.bias_correction = BiasOffsets(self, switch_of(model), layer.weight.detach().flatten(1)[:, 0])

    def start(self, model: nn.Module) -> PtqRun:
        return _BiasCorrectionRun(model)


class _BiasCorrectionRun(PtqRun):
    """Measures the offsets of one model.

    Within each batch the output of each layer is shifted at once, so that later layers see corrected inputs. A
    correction is the mean of these shifts over all images: exact on one batch, close on many.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.passes = len(quantized_precisions(model))
        # By layer, in the order of its calls: the mean output per channel, (out,), and the number of images it is of.
        self._means: dict[SwitchableLayer, list[tuple[Tensor, int]]] = {
            layer: [] for layer in switchable_layers(model).values()
        }

    def watching_float(self) -> AbstractContextManager[None]:
        def note(layer: SwitchableLayer, _: object, y: Tensor) -> None:
            self._means[layer].append((_channel_means(layer, y), len(y)))

        return _hooked(self._means, note)

    def improve(self, batches: Iterable[Tensor], count_batch: Callable[[], object]) -> None:
        for precision in quantized_precisions(self._model):
            for layer, shifts in self._measure(precision, batches, count_batch).items():
                assert layer.bias_correction is not None
                offset = layer.bias_correction.offset(precision)
                images = torch.tensor([n for _, n in self._means[layer]], dtype=offset.dtype, device=offset.device)
                offset.copy_(torch.stack(shifts, dim=1) @ images / images.sum())

    def _measure(
        self, precision: Precision, batches: Iterable[Tensor], count_batch: Callable[[], object]
    ) -> dict[SwitchableLayer, list[Tensor]]:
        """Return the shift of each layer in each of its calls, (out,) each."""
        model = self._model
        # One block per precision, so that quantized weights of one precision only are in memory.
        with evaluating(model), at_precision(model, precision), frozen_weights(model), self._shifting() as shifts:
            for images in batches:
                model(images)
                count_batch()
        return shifts

    @contextmanager
    def _shifting(self) -> Generator[dict[SwitchableLayer, list[Tensor]]]:
        """Shift every output to its mean in the float network, and collect the shifts, (out,) each."""
        shifts: dict[SwitchableLayer, list[Tensor]] = {layer: [] for layer, found in self._means.items() if found}

        def shift(layer: SwitchableLayer, _: object, y: Tensor) -> Tensor:
            mean, _ = self._means[layer][len(shifts[layer])]
            shifts[layer].append(mean - _channel_means(layer, y))
            return y + shifts[layer][-1].view(-1, *(1,) * (y.dim() - 2 if isinstance(layer, SwitchableConv2d) else 0))

        with _hooked(shifts, shift):
            yield shifts


@contextmanager
def _hooked(
    layers: Iterable[SwitchableLayer], hook: Callable[[SwitchableLayer, object, Tensor], Tensor | None]
) -> Generator[None]:
    def hidden_hook(layer: SwitchableLayer, args: object, y: Tensor) -> Tensor | None:
        # The hook's own products and sums are not part of a module that quantizes its own.
        with products_not_intercepted():
            return hook(layer, args, y)

    handles = [layer.register_forward_hook(hidden_hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _channel_means(layer: SwitchableLayer, y: Tensor) -> Tensor:
    """Return the mean of each output channel, (out,): dimension 1 of a convolution's output, the last of a linear's."""
    channel = 1 if isinstance(layer, SwitchableConv2d) else y.dim() - 1
    return y.mean([d for d in range(y.dim()) if d != channel])
