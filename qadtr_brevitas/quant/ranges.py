"""Range search: samples of values, their percentiles, and the thresholds of least squared error."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from qadtr_brevitas.core.seeding import generator
from qadtr_brevitas.quant.quantizer import Levels

# The search for the least error: thresholds a factor of sqrt(2) apart, then ever closer ones around the best of them.
_COARSE = [2 ** (-step / 2) for step in range(10)]
_FINE = [2**0.25, 2**0.125, 2**0.0625]
# The search among powers of two, where the threshold that clips nothing may be twice the largest magnitude.
_HALVES = [2.0**-step for step in range(6)]
# Numbers of largest values, and of others at random, in which the search measures the error.
_PER_CHANNEL, _PER_TENSOR = (12, 244), (1 << 10, 1 << 14)
# Values of a block of rows: the block and two results stay in a core's L2 cache through all passes over them.
_BLOCK = 1 << 17


def percentiles(rows: Tensor, percentile: float) -> Tensor:
    """Return the percentile of each row's magnitudes, interpolated as in torch.quantile, without sorting them all.

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
    """A weighted sample of the values of each row.

    Args:
        rows: the sampled values, (rows, n).
        largest: the largest magnitude of all values of each row, (rows,).
        tail: number of leading columns with weight 1: the largest values, which a threshold clips first.
        weight: weight of each of the other columns.
    """

    rows: Tensor
    largest: Tensor
    tail: int = 0
    weight: float = 1.0


def all_of(rows: Tensor) -> Sample:
    """Return a sample of all values of each row, (rows, n)."""
    return Sample(rows, torch.maximum(rows.amax(1), -rows.amin(1)))


def thinned(sample: Sample) -> Sample:
    """Return the largest values of each row, for the clipping error, and some others at random, for the rounding error.

    Without the largest values the search would clip too much: at 8 bit, the error of a single clipped value may equal
    that of all rounding.

    Args:
        sample: values that all have weight 1.
    """
    rows, count = sample.rows, sample.rows.shape[1]
    # Few values of each of many channels; more of the one row of activations, which have longer tails.
    tail, others = _PER_CHANNEL if len(rows) > 1 else _PER_TENSOR
    if count <= tail + others:
        return sample
    # Columns at equal distances could all be the same place of convolution kernels.
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
    """Return the threshold of each row with the least squared quantization error, by a grid search that gets finer.

    Args:
        sample: the values.
        start: the largest threshold to try for each row, (rows,), above 0; a row of zeros gets it.
        levels: lowest and highest integer level.
        steps: number of steps between 0 and the threshold.
        halves: try only `start`, half of it, a quarter and so on, so that powers of two stay powers of two.
        rounding: rounds values in steps, by at most half a step where they are not clipped.

    Returns:
        Thresholds, (rows,): within 5 % of the best between 1/23 of `start` and `start`, or, with `halves`, the best of
        those from `start` / 32 to `start`.
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
    """Search a block of rows: shares of their largest threshold, then factors around the best of them."""
    rows, largest, tail, weight = sample.rows, sample.largest, sample.tail, sample.weight
    count = tail + weight * (rows.shape[1] - tail)
    scaled, rounded = torch.empty_like(rows), torch.empty_like(rows)
    best, least = largest, torch.full_like(largest, torch.inf)

    def attempt(thresholds: Tensor) -> Tensor:
        """Keep the thresholds that are better, and return the errors beyond the bound of rounding errors."""
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
        # Clipping alone is worse than the best so far, and lower thresholds clip more.
        if (attempt(largest * share) > least).all():
            break
    for factor in factors:
        center = best
        attempt(center / factor)
        attempt(torch.minimum(center * factor, largest))
    return best
