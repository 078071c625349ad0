"""What activation quantizers see on images: a sample of bounded size, and the largest magnitude of all."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from qadtr_brevitas.errors import UsageError
from qadtr_brevitas.quant.quantizers import SwitchableQuant
from qadtr_brevitas.quant.ranges import Sample
from qadtr_brevitas.seeding import generator

# Values kept of what a quantizer sees: some 13 of them lie above the 99.99th percentile.
_SAMPLES = 1 << 17


class Activations:
    """Collects what each activation quantizer would have to quantize, the same amount from each batch.

    Args:
        batches: how many batches there will be.
    """

    def __init__(self, batches: int) -> None:
        self._per_batch = -(-_SAMPLES // batches)
        self._samples: dict[SwitchableQuant, list[Tensor]] = {}
        self._largest: dict[SwitchableQuant, float] = {}
        self._rng = generator(0, "calibrate")

    def __iter__(self) -> Iterator[SwitchableQuant]:
        """The quantizers that saw anything."""
        return iter(self._samples)

    def add(self, quantizer: SwitchableQuant, x: Tensor) -> None:
        """Takes values at random, or all where they are few, and notes the largest magnitude.

        Args:
            quantizer: who sees x. What it cuts off at any threshold, below 0 or above a fixed limit, is cut off.
            x: of any shape and floating-point type.

        Raises:
            UsageError: a value is not finite.
        """
        low, high = (float(end) for end in torch.aminmax(x))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise UsageError(
                "the network computes values that are not finite on the calibration images: "
                "check its weights and that images lie in [0, 1]"
            )
        lowest = -math.inf if quantizer.signed else 0.0
        highest = quantizer.max_threshold or math.inf
        largest = max(-max(low, lowest), min(high, highest), 0.0)
        self._largest[quantizer] = max(self._largest.get(quantizer, 0.0), largest)
        values = x.reshape(-1)
        if len(values) > self._per_batch:
            indices = torch.randint(len(values), (self._per_batch,), generator=self._rng)
            values = values.take(indices.to(x.device))
        self._samples.setdefault(quantizer, []).append(values.float().clamp(lowest, highest))

    def seen_by(self, quantizer: SwitchableQuant) -> Sample:
        """What a quantizer saw, as one row."""
        values = torch.cat(self._samples[quantizer])
        return Sample(values[None], values.new_tensor([self._largest[quantizer]]))
