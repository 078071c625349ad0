"""Thresholds from samples of what is to be quantized: the largest magnitude, a percentile, the least squared error."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Method = Literal["mse", "minmax", "percentile"]

# The search for the least error: thresholds a factor of sqrt(2) apart, then ever closer ones around the best of them.
_COARSE = [2 ** (-step / 2) for step in range(10)]
_FINE = [2**0.25, 2**0.125, 2**0.0625]
# Values of a block of rows: it and two results stay in a core's L2 cache through all passes over them.
_BLOCK = 1 << 16


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


def least_error(rows: Tensor, largest: Tensor, levels: tuple[int, int], steps: int) -> Tensor:
    """The threshold of each row with the least squared quantization error, by a grid search that gets finer.

    Args:
        rows: samples, (rows, n).
        largest: the largest threshold of each row to try, positive, (rows,).
        levels: lowest and highest integer level.
        steps: number of steps between 0 and the threshold.

    Returns:
        Thresholds, (rows,), within 5 % of the best between 1/23 of the largest and the largest.
    """
    height = max(1, _BLOCK // rows.shape[1])
    blocks = zip(rows.split(height), largest.split(height), strict=True)
    return torch.cat([_search(block, most, levels, steps) for block, most in blocks])


def _search(rows: Tensor, largest: Tensor, levels: tuple[int, int], steps: int) -> Tensor:
    """`least_error` for a block of rows."""
    scaled, rounded = torch.empty_like(rows), torch.empty_like(rows)

    def error(thresholds: Tensor) -> Tensor:
        step = (thresholds / steps)[:, None]
        torch.div(rows, step, out=scaled)
        torch.round(scaled, out=rounded).clamp_(*levels).sub_(scaled)
        return torch.linalg.vector_norm(rounded, dim=1) * step[:, 0]

    best, least = largest, error(largest)

    def attempt(thresholds: Tensor) -> None:
        nonlocal best, least
        found = error(thresholds)
        best, least = torch.where(found < least, thresholds, best), torch.minimum(found, least)

    for share in _COARSE[1:]:
        attempt(largest * share)
    for factor in _FINE:
        center = best
        attempt(center / factor)
        attempt(torch.minimum(center * factor, largest))
    return best
