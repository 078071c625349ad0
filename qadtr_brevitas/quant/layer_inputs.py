"""What layers are given, layer after layer: the second moments of their inputs, on which levels of weights are chosen.

Where the levels of a weight change the output of a layer by an error e per input, the squared error over all inputs is
e H e^T, with H the second moments of the inputs. So the moments are all that is needed of the images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qadtr_brevitas.core.precision import FLOAT_BITS, Precision
from qadtr_brevitas.core.seeding import generator
from qadtr_brevitas.quant.layers import SwitchableConv2d, SwitchableLayer, SwitchableLinear, switchable_layers
from qadtr_brevitas.quant.products import products_not_intercepted
from qadtr_brevitas.quant.proxies import SwitchableActProxy
from qadtr_brevitas.quant.switch import at_precision

_FLOAT = Precision(FLOAT_BITS, FLOAT_BITS)
# Inputs per weight of a channel, beyond which moments hardly change.
_INPUTS_PER_WEIGHT = 32


@dataclass
class Moments:
    """The second moments of the inputs of one layer.

    Attributes:
        quantized: of the inputs as they are quantized, (groups, n, n) for n weights of an output channel.
        mixed: the products of float inputs with quantized ones, (groups, n, n); None if they were not asked for.
    """

    quantized: Tensor
    mixed: Tensor | None


class LayerCalls:
    """The layers of a model in the order in which a forward pass reaches them, and how often it does.

    Args:
        model: a switchable model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._calls: dict[SwitchableLayer, int] = {}
        self._images: list[int] = []

    @contextmanager
    def watching(self) -> Generator[None]:
        """Note the calls of the forward passes within a block, all over the same layers."""

        def note_batch(_: object, args: tuple[Tensor, ...]) -> None:
            self._images.append(len(args[0]))
            self._calls.clear()

        def note(layer: SwitchableLayer, _: object) -> None:
            self._calls[layer] = self._calls.get(layer, 0) + 1

        handles = [self._model.register_forward_pre_hook(note_batch)]
        handles += [layer.register_forward_pre_hook(note) for layer in switchable_layers(self._model).values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def parts(self, size: int) -> list[list[SwitchableLayer]]:
        """Return the layers in parts of the given size, in order."""
        layers = list(self._calls)
        return [layers[start : start + size] for start in range(0, len(layers), size)]

    def moments(
        self,
        part: Sequence[SwitchableLayer],
        precision: Precision,
        batches: Iterable[Tensor],
        count_batch: Callable[[], object],
        *,
        mixed: bool,
    ) -> dict[SwitchableLayer, Moments]:
        """Return the moments of the inputs of some layers; each forward pass ends at the last of them.

        The model is in eval mode; within `frozen_weights` it quantizes only the weights that changed since.

        Args:
            part: layers of the model.
            precision: the precision of the quantized inputs, below 32.
            batches: images (n, C, H, W) in [0, 1].
            count_batch: called after each batch.
            mixed: whether to run the float network too, for `Moments.mixed`.
        """
        found = {layer: _empty(layer, mixed=mixed) for layer in part}
        for index, images in enumerate(batches):
            float_inputs = self._inputs(part, _FLOAT, images, index) if mixed else {}
            for layer, rows in self._inputs(part, precision, images, index).items():
                moments = found[layer]
                moments.quantized.baddbmm_(rows.mT, rows)
                if moments.mixed is not None:
                    moments.mixed.baddbmm_(float_inputs[layer].mT, rows)
            count_batch()
        return found

    def _inputs(
        self, part: Sequence[SwitchableLayer], precision: Precision, images: Tensor, index: int
    ) -> dict[SwitchableLayer, Tensor]:
        """Return inputs of some layers in one forward pass, (groups, inputs, n) each."""
        calls: dict[SwitchableLayer, list[Tensor]] = {layer: [] for layer in part}
        expected = sum(self._calls[layer] for layer in part)
        order = {layer: place for place, layer in enumerate(self._calls)}

        def note(layer: SwitchableLayer, args: tuple[Tensor, ...]) -> None:
            with products_not_intercepted():
                seen = _seen(layer, args[0])
                wanted = self._wanted(layer, len(images))
                if wanted < math.prod(seen.shape[:3]):
                    # The same places in the float and in the quantized network.
                    drawn = generator(0, "layer inputs", order[layer], index, len(calls[layer]))
                    places = torch.randperm(math.prod(seen.shape[:3]), generator=drawn)[:wanted].to(seen.device)
                    rows = seen[torch.unravel_index(places, seen.shape[:3])]
                else:
                    rows = seen.flatten(0, 2)
                groups = layer.groups if isinstance(layer, SwitchableConv2d) else 1
                rows = rows.reshape(len(rows), groups, -1).transpose(0, 1)
                calls[layer].append(rows)
            if sum(map(len, calls.values())) == expected:
                raise _LastLayer

        handles = [layer.register_forward_pre_hook(note) for layer in part]
        try:
            with at_precision(self._model, precision):
                self._model(images)
        except _LastLayer:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return {layer: torch.cat(rows, dim=1) for layer, rows in calls.items()}

    def _wanted(self, layer: SwitchableLayer, images: int) -> int:
        """Return how many inputs of one call of a layer to take from a batch of images."""
        weights = layer.weight[0].numel()
        return math.ceil(_INPUTS_PER_WEIGHT * weights * images / (sum(self._images) * self._calls[layer]))


class _LastLayer(Exception):
    """Ends a forward pass."""


def _empty(layer: SwitchableLayer, *, mixed: bool) -> Moments:
    groups, weights = layer.groups if isinstance(layer, SwitchableConv2d) else 1, layer.weight[0].numel()
    zeros = layer.weight.new_zeros(groups, weights, weights, dtype=torch.float32, requires_grad=False)
    return Moments(zeros, zeros.clone() if mixed else None)


def _seen(layer: SwitchableLayer, x: Tensor) -> Tensor:
    """Return what each output of a layer is computed from, as quantized: a view of one value at many places.

    Returns:
        (images, rows, columns, in, height, width) for a convolution; (..., 1, 1, in) for a linear layer.
    """
    quant = layer.input_quant
    if isinstance(quant, SwitchableActProxy):
        x = quant.quantize(x)
    x = x.detach().float()
    if isinstance(layer, SwitchableLinear):
        return x.reshape(-1, 1, 1, x.shape[-1])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    # Torch keeps the padding of each side here, for padding="same" too.
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)  # pyright: ignore[reportPrivateUsage]
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    size = [(x.shape[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    images, channels, *pixel = x.stride()
    steps = [[by[i] * pixel[i] for i in (0, 1)] for by in (stride, dilation)]
    return x.as_strided((len(x), *size, x.shape[1], *kernel), (images, *steps[0], channels, *steps[1]))
