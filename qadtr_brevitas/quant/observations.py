"""Samples of bounded size of what activation quantizers observe during calibration."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.seeding import generator
from qadtr_brevitas.quant.ranges import Sample
from qadtr_brevitas.quant.switchable_quant import SwitchableQuant

# Number of sampled values per quantizer: about 13 of them lie above the 99.99th percentile.
_SAMPLES = 1 << 17


class Observations:
    """Samples of the tensors that activation quantizers observe, of the same size from each batch.

    Args:
        quantizers: all activation quantizers of the model.
        batches: number of batches to come.
        sampled: keep samples, not only the largest magnitudes.
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
        """Iterate over the quantizers that observed anything."""
        return iter(self._largest)

    def add(self, quantizer: SwitchableQuant, x: Tensor) -> None:
        """Sample values at random, or all if there are few, and record the largest magnitude.

        Args:
            quantizer: the quantizer that observes x. Values that it clips at any threshold, below 0 or above a fixed
                limit, are clipped here.
            x: values of any shape and floating-point type.

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
            # One tensor for all: many small ones between the large activations of a forward would keep the memory
            # allocator from reusing the space of the activations.
            self._pool = torch.empty(len(self._rows), _SAMPLES, device=device)
        return self._pool[self._rows[quantizer]]

    def _choose(self, quantizer: SwitchableQuant, x: Tensor) -> tuple[Tensor, slice | Tensor]:
        """Return a sample of the values, and its slots in the row."""
        kept, count = self._kept[quantizer], min(x.numel(), self._per_batch)
        slots = slice(kept, kept + count)
        if kept + count > _SAMPLES:
            # The quantizer is called in several places: every call so far gets the same share.
            count = kept // self._calls[quantizer]
            slots = torch.randperm(kept, generator=self._rng)[:count].to(x.device)
        else:
            self._kept[quantizer] += count
        if count == x.numel():
            return x.reshape(-1), slots
        # take() reads x in any memory layout, where flattening might copy it first.
        return x.take(torch.randint(x.numel(), (count,), generator=self._rng).to(x.device)), slots

    def seen_by(self, quantizer: SwitchableQuant) -> Sample:
        """Return the values that a quantizer observed, as one row; none of them if nothing is sampled."""
        largest = torch.tensor([self._largest[quantizer]])
        if self._pool is None:
            return Sample(torch.empty(1, 0), largest)
        return Sample(self._pool[self._rows[quantizer]][None, : self._kept[quantizer]], largest.to(self._pool.device))
