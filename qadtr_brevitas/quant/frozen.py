"""Weights that are quantized once for many forward passes (`frozen_weights`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Of the weights that one quantizer quantizes in a forward pass, so many are kept.
_MOST = 16


class _Entry(NamedTuple):
    source: Tensor
    version: int
    quantized: Tensor

    @property
    def is_current(self) -> bool:
        """Whether the source was not changed in place since."""
        return version_of(self.source) == self.version


class FrozenWeights:
    """Weights that were quantized before, by quantizer and bit-width.

    A parameter is found again as the same tensor that was not changed since. A weight that the network computes in
    each forward is found by its values, because one quantizer may quantize several weights.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[int, ...], list[_Entry]] = {}

    def get(self, key: tuple[int, ...], weight: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
        """Return a quantized weight, without a gradient.

        Args:
            key: the id of the quantizer, the bit-width, and how often its threshold was changed.
            weight: the weight.
            quantize: called with a weight that is not known.
        """
        entries = [entry for entry in self._found.get(key, []) if entry.is_current]
        is_parameter = isinstance(weight, nn.Parameter)
        for source, _, quantized in entries:
            if source is weight or (not (is_parameter or isinstance(source, nn.Parameter)) and _same(source, weight)):
                return quantized
        # A tensor of inference mode could not take part in a later forward that records gradients.
        with torch.inference_mode(False), torch.no_grad():
            quantized = quantize(weight)
        entry = _Entry(weight if is_parameter else weight.detach(), version_of(weight), quantized)
        self._found[key] = [*entries[1 - _MOST :], entry]
        return quantized


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place; those of inference mode do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def _same(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and one.dtype == other.dtype and torch.equal(one, other)
