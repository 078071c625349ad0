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
        self._largest: dict[SwitchableQuant, Tensor] = {}
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
        rows = _of_each_threshold(quantizer, x)
        ends = torch.aminmax(x) if rows is None else torch.aminmax(rows, dim=1)
        low, high = (end.reshape(-1).float() for end in ends)
        if not (low.isfinite().all() and high.isfinite().all()):
            raise UsageError(
                "the network computes values that are not finite on the calibration images: "
                "check its weights and that images lie in [0, 1]"
            )
        lowest = -math.inf if quantizer.signed else 0.0
        highest = quantizer.max_threshold or math.inf
        largest = torch.maximum(-low.clamp(min=lowest), high.clamp(max=highest)).clamp(min=0).cpu()
        before = self._largest.get(quantizer)
        self._largest[quantizer] = largest if before is None else torch.maximum(before, largest)
        if self._per_batch:
            self._calls[quantizer] += 1
            columns, slots = self._choose(quantizer, x, rows)
            self._columns(quantizer, x.device)[slots] = columns.float().clamp(lowest, highest)

    def _columns(self, quantizer: SwitchableQuant, device: torch.device) -> Tensor:
        """Return the samples of a quantizer, (n, thresholds)."""
        if self._pool is None:
            # One tensor for all: many small ones between the large activations of a forward would keep the memory
            # allocator from reusing the space of the activations.
            self._pool = torch.empty(len(self._rows), _SAMPLES, device=device)
        count = math.prod(quantizer.shape)
        return self._pool[self._rows[quantizer]][: _SAMPLES // count * count].view(-1, count)

    def _choose(self, quantizer: SwitchableQuant, x: Tensor, rows: Tensor | None) -> tuple[Tensor, slice | Tensor]:
        """Return a sample of the values, (n, thresholds), and its slots among those of the quantizer."""
        thresholds = math.prod(quantizer.shape)
        total, most = x.numel() // thresholds, _SAMPLES // thresholds
        kept, count = self._kept[quantizer], min(total, self._per_batch // thresholds)
        slots = slice(kept, kept + count)
        if kept + count > most:
            # The quantizer is called in several places: every call so far gets the same share.
            count = kept // self._calls[quantizer]
            slots = torch.randperm(kept, generator=self._rng)[:count].to(x.device)
        else:
            self._kept[quantizer] += count
        if count == total:
            return (x.reshape(-1, 1) if rows is None else rows.T), slots
        chosen = torch.randint(total, (count,), generator=self._rng).to(x.device)
        # take() reads x in any memory layout, where flattening might copy it first.
        return (x.take(chosen)[:, None] if rows is None else rows[:, chosen].T), slots

    def seen_by(self, quantizer: SwitchableQuant) -> Sample:
        """Return the values that a quantizer observed, a row for each threshold; none of them if nothing is sampled."""
        largest = self._largest[quantizer]
        if self._pool is None:
            return Sample(torch.empty(len(largest), 0), largest)
        seen = self._columns(quantizer, self._pool.device)[: self._kept[quantizer]]
        return Sample(seen.T.contiguous(), largest.to(seen.device))


def _of_each_threshold(quantizer: SwitchableQuant, x: Tensor) -> Tensor | None:
    """Return the values that each threshold covers, (thresholds, n); None where one covers all."""
    if not quantizer.shape:
        return None
    (heads,) = (dim for dim, size in enumerate(quantizer.shape) if size > 1)
    return x.movedim(heads - len(quantizer.shape), 0).reshape(quantizer.shape[heads], -1)
