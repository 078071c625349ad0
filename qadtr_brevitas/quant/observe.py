"""What activation quantizers see on images: a sample of bounded size, and the largest magnitude of all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qadtr_brevitas.errors import UsageError
from qadtr_brevitas.quant.quantizers import SwitchableQuant
from qadtr_brevitas.quant.ranges import Sample
from qadtr_brevitas.seeding import generator

# Values kept of what a quantizer sees: some 13 of them lie above the 99.99th percentile.
_SAMPLES = 1 << 17


class Observations:
    """Collects what each activation quantizer would have to quantize, the same amount from each batch.

    Args:
        quantizers: all there are.
        batches: how many batches there will be.
        sampled: keep samples, and not only the largest magnitudes.
    """

    def __init__(self, quantizers: Sequence[SwitchableQuant], batches: int, *, sampled: bool = True) -> None:
        self._rows = {quantizer: row for row, quantizer in enumerate(quantizers)}
        self._per_batch = max(1, _SAMPLES // batches) if sampled else 0
        self._kept = dict.fromkeys(quantizers, 0)
        self._calls = dict.fromkeys(quantizers, 0)
        self._largest: dict[SwitchableQuant, float] = {}
        self._pool: Tensor | None = None
        self._rng = generator(0, "calibrate")

    def __iter__(self) -> Iterator[SwitchableQuant]:
        """The quantizers that saw anything."""
        return iter(self._largest)

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
        if self._per_batch:
            self._calls[quantizer] += 1
            sample, slots = self._choose(quantizer, x)
            self._row(quantizer, x.device)[slots] = sample.float().clamp(lowest, highest)

    def _row(self, quantizer: SwitchableQuant, device: torch.device) -> Tensor:
        if self._pool is None:
            # In one piece: many small ones between the large activations of a forward would keep the system's memory
            # allocator from using the place of these again.
            self._pool = torch.empty(len(self._rows), _SAMPLES, device=device)
        return self._pool[self._rows[quantizer]]

    def _choose(self, quantizer: SwitchableQuant, x: Tensor) -> tuple[Tensor, slice | Tensor]:
        """A sample of the values, and where to keep it."""
        kept, count = self._kept[quantizer], min(x.numel(), self._per_batch)
        slots = slice(kept, kept + count)
        if kept + count > _SAMPLES:
            # A quantizer that is called in several places: each call so far is to have the same share.
            count = kept // self._calls[quantizer]
            slots = torch.randperm(kept, generator=self._rng)[:count].to(x.device)
        else:
            self._kept[quantizer] += count
        if count == x.numel():
            return x.reshape(-1), slots
        # Taken from x as it lies in memory, which may be in strides: flattened, it would be copied first.
        return x.take(torch.randint(x.numel(), (count,), generator=self._rng).to(x.device)), slots

    def seen_by(self, quantizer: SwitchableQuant) -> Sample:
        """What a quantizer saw, as one row; without a sample, none of its values."""
        largest = torch.tensor([self._largest[quantizer]])
        if self._pool is None:
            return Sample(torch.empty(1, 0), largest)
        return Sample(self._pool[self._rows[quantizer]][None, : self._kept[quantizer]], largest.to(self._pool.device))
