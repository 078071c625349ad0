"""Thresholds from samples of what is to be quantized: the largest magnitude, a percentile, the least squared error.

What activation quantizers see on images: a sample of bounded size, and the largest magnitude of all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.seeding import generator
from qadtr_brevitas.quant.quantizer import Levels
from qadtr_brevitas.quant.switchable_quant import SwitchableQuant

Method = Literal["mse", "minmax", "percentile"]

# The search for the least error: thresholds a factor of sqrt(2) apart, then ever closer ones around the best of them.
_COARSE = [2 ** (-step / 2) for step in range(10)]
_FINE = [2**0.25, 2**0.125, 2**0.0625]
# The search among powers of two, where the largest threshold may be twice as large as what is to be clipped.
_HALVES = [2.0**-step for step in range(6)]
# The search for the least error looks at so many of the largest values, and at so many others at random.
_PER_CHANNEL, _PER_TENSOR = (12, 244), (1 << 10, 1 << 14)
# Values of a block of rows: it and two results stay in a core's L2 cache through all passes over them.
_BLOCK = 1 << 17


def percentiles(rows: Tensor, percentile: float) -> Tensor:
    """The percentile of each row's magnitudes, interpolated as torch.quantile does, without sorting them all.

    Args:
        rows: (rows, n).
        percentile: in (0, 100].

    Returns:
        (rows,).
    """
    position = percentile / 100 * (rows.shape[1] - 1)
    below = math.floor(position)
    above = rows.abs().topk(rows.shape[1] - below, dim=1).values
    return torch.lerp(above[:, -1], above[:, -2:][:, 0], position - below)


@dataclass(frozen=True)
class Sample:
    """Values that stand for all of each row.

    Args:
        rows: (rows, n).
        largest: the largest magnitude of all values of each row, (rows,).
        tail: the first so many columns count once: the largest values, which are what is clipped.
        weight: how often each of the other columns counts.
    """

    rows: Tensor
    largest: Tensor
    tail: int = 0
    weight: float = 1.0


def all_of(rows: Tensor) -> Sample:
    """All values of each row, (rows, n)."""
    return Sample(rows, torch.maximum(rows.amax(1), -rows.amin(1)))


def thinned(sample: Sample) -> Sample:
    """The largest values of each row, and some of the others at random: both kinds of error can be told from them.

    Without the former the search would clip too much: at 8 bit, a single clipped value weighs as much as all rounding.

    Args:
        sample: of values that all count once.
    """
    rows, count = sample.rows, sample.rows.shape[1]
    # Few of each of many channels, more of the one row of activations, with their longer tails.
    tail, others = _PER_CHANNEL if len(rows) > 1 else _PER_TENSOR
    if count <= tail + others:
        return sample
    # Evenly spread columns could all be the same corner of convolution kernels.
    columns = torch.randperm(count, generator=generator(0, "columns"))[:others].to(rows.device)
    magnitudes, where = rows.abs().topk(tail, dim=1)
    rest = rows[:, columns]
    rest.masked_fill_(rest.abs() >= magnitudes[:, -1:], 0)
    return Sample(torch.cat((rows.gather(1, where), rest), dim=1), sample.largest, tail, count / others)


class Rounding(Protocol):
    """Rounds values in steps to levels (`Quantizer.round`)."""

    def __call__(self, scaled: Tensor, levels: Levels, *, out: Tensor) -> Tensor:
        """Write the rounded values to `out`, which is returned."""
        ...


def _to_integers(scaled: Tensor, levels: Levels, *, out: Tensor) -> Tensor:
    return torch.round(scaled, out=out).clamp_(*levels)


def least_error(
    sample: Sample,
    start: Tensor,
    levels: Levels,
    steps: int,
    *,
    halves: bool = False,
    rounding: Rounding = _to_integers,
) -> Tensor:
    """The threshold of each row with the least squared quantization error, by a grid search that gets finer.

    Args:
        sample: of the values.
        start: the largest threshold to try for each row, (rows,), above 0; that of a row of zeros.
        levels: lowest and highest integer level.
        steps: number of steps between 0 and the threshold.
        halves: try only `start`, half of it, a quarter and so on, so that powers of two stay powers of two.
        rounding: rounds values in steps; by at most half a step where they are not clipped.

    Returns:
        Thresholds, (rows,): within 5 % of the best between 1/23 of `start` and `start`; with `halves` the best of those
        down to 1/32.
    """
    height = max(1, _BLOCK // sample.rows.shape[1])
    blocks = zip(sample.rows.split(height), start.split(height), strict=True)
    shares, factors = (_HALVES, []) if halves else (_COARSE, _FINE)
    return torch.cat(
        [
            _search(replace(sample, rows=rows, largest=largest), levels, steps, shares, factors, rounding)
            for rows, largest in blocks
        ]
    )


def _search(
    sample: Sample, levels: Levels, steps: int, shares: list[float], factors: list[float], rounding: Rounding
) -> Tensor:
    """`least_error` for a block of rows: shares of their largest threshold, then factors around the best of them."""
    rows, largest, tail, weight = sample.rows, sample.largest, sample.tail, sample.weight
    count = tail + weight * (rows.shape[1] - tail)
    scaled, rounded = torch.empty_like(rows), torch.empty_like(rows)
    best, least = largest, torch.full_like(largest, torch.inf)

    def attempt(thresholds: Tensor) -> Tensor:
        """Keeps the thresholds that are better, and gives the errors that rounding cannot explain."""
        nonlocal best, least
        step = thresholds / steps
        torch.mul(rows, step.reciprocal()[:, None], out=scaled)
        rounding(scaled, levels, out=rounded).sub_(scaled)
        found = torch.linalg.vector_norm(rounded[:, tail:], dim=1).square_().mul_(weight)
        if tail:
            found += torch.linalg.vector_norm(rounded[:, :tail], dim=1).square_()
        step.square_()
        found *= step
        better = found < least
        best, least = torch.where(better, thresholds, best), torch.where(better, found, least)
        return found - step * (count / 4)

    for share in shares:
        # That is by clipping, and lower thresholds clip more.
        if (attempt(largest * share) > least).all():
            break
    for factor in factors:
        center = best
        attempt(center / factor)
        attempt(torch.minimum(center * factor, largest))
    return best


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
