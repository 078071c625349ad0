"""Setting quantizer ranges and norm statistics from data, without training."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from qadtr_brevitas.errors import UsageError
from qadtr_brevitas.precision import PrecisionLike
from qadtr_brevitas.quant.norm import copy_float_statistics, norms
from qadtr_brevitas.quant.quantizers import SwitchableQuant, SwitchableWeightQuant
from qadtr_brevitas.quant.switch import at_precision, observing, precisions_or_all
from qadtr_brevitas.seeding import generator

Method = Literal["mse", "minmax", "percentile"]

# Thresholds tried by the MSE search, as shares of the largest magnitude: coarse ones, then around the best of them.
_COARSE = [share / 20 for share in range(1, 21)]
_FINE = [step / 100 for step in (-4, -3, -2, -1, 1, 2, 3, 4)]
_WEIGHTS_PER_ROW = 1 << 10
_SAMPLES_PER_BATCH = 1 << 13


def calibrate(model: nn.Module, batches: Iterable[Tensor], *, method: Method = "mse", percentile: float = 99.9) -> None:
    """Sets the thresholds of every quantizer at every bit-width, and gives every precision the 32-bit norm statistics.

    The network runs in float; each activation quantizer looks at what it would have to quantize.

    Args:
        model: a switchable model; changed in place.
        batches: images, each (N, C, H, W) in [0, 1].
        method: `mse` minimizes the squared quantization error per bit-width (a grid search); `minmax` clips nothing;
            `percentile` clips what lies above a percentile of the magnitudes.
        percentile: for `percentile`, in (0, 100].

    Raises:
        UsageError: no images, an unknown method, or a percentile out of range.
    """
    if method not in ("mse", "minmax", "percentile"):
        raise UsageError(f"calibration method {method!r} is not known: choose mse, minmax or percentile")
    if not 0 < percentile <= 100:
        raise UsageError(f"percentile is {percentile}: it must be above 0 and at most 100, e.g. 99.9")
    observed = _observe(model, batches)
    for quantizer, (sample, largest) in observed.items():
        _set_thresholds(quantizer, sample, largest, method, percentile)
    copy_float_statistics(model)


def recalibrate_norms(
    model: nn.Module, batches: Sequence[Tensor], *, precisions: Sequence[PrecisionLike] | None = None
) -> None:
    """Measures the norm statistics of each precision anew, as the mean over batches.

    Args:
        model: a switchable model; only running statistics change, in place.
        batches: images, each (N, C, H, W) in [0, 1], drawn at random over all classes (class-sorted batches cost
            about 6 points of accuracy).
        precisions: default all; 32 bit is measured too where it is among them.

    Raises:
        UsageError: no images, or a precision that is not allowed.
    """
    layers = norms(model)
    was_training = model.training
    model.eval()
    for precision in precisions_or_all(model, precisions):
        with at_precision(model, precision), _averaging(layers) as count_batch, torch.no_grad():
            count = 0
            for count, images in enumerate(batches, start=1):
                count_batch(count)
                model(images)
        if count == 0:
            raise UsageError("no images to measure norm statistics on: give at least one batch")
    model.train(was_training)


@contextmanager
def _averaging(layers: Sequence[nn.BatchNorm2d]) -> Generator[Callable[[int], None]]:
    """Norm layers in training mode, so that after n batches their statistics are the mean over these n."""
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.train()

    def count_batch(count: int) -> None:
        for layer in layers:
            layer.momentum = 1.0 / count

    try:
        yield count_batch
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def _observe(model: nn.Module, batches: Iterable[Tensor]) -> dict[SwitchableQuant, tuple[Tensor, Tensor]]:
    """For each quantizer: samples (rows, n) of what it would have to quantize, and the largest magnitudes (rows,)."""
    seen: dict[SwitchableQuant, list[Tensor]] = {}
    largest: dict[SwitchableQuant, Tensor] = {}
    rng = generator(0, "calibrate")

    def observe(quantizer: SwitchableQuant, x: Tensor) -> None:
        if isinstance(quantizer, SwitchableWeightQuant):
            if quantizer not in seen:
                rows = x.flatten(1) if math.prod(quantizer.shape) > 1 else x.reshape(1, -1)
                seen[quantizer], largest[quantizer] = [_thinned(rows)], rows.abs().amax(1)
            return
        x = x.flatten()
        picked = x[torch.randint(len(x), (_SAMPLES_PER_BATCH,), generator=rng).to(x.device)]
        kept = picked if quantizer.signed else picked.clamp_min(0)
        peak = x.abs().max() if quantizer.signed else x.max().clamp_min(0)
        seen.setdefault(quantizer, []).append(kept[None])
        largest[quantizer] = torch.maximum(largest.get(quantizer, peak), peak[None])

    with observing(model, observe):
        count = 0
        for count, images in enumerate(batches, start=1):  # noqa: B007
            model(images)
    if count == 0:
        raise UsageError("no images to calibrate on: give at least one batch")
    return {quantizer: (torch.cat(values, dim=1), largest[quantizer]) for quantizer, values in seen.items()}


def _thinned(rows: Tensor) -> Tensor:
    """At most so many values of each row, evenly spread: enough for an error or a percentile to be told from."""
    return rows[:, :: -(-rows.shape[1] // _WEIGHTS_PER_ROW)]


def _set_thresholds(quant: SwitchableQuant, rows: Tensor, peaks: Tensor, method: Method, percentile: float) -> None:
    """Sets the thresholds of one quantizer from samples (rows, n) and their largest magnitudes (rows,)."""
    peaks = torch.where(peaks > 0, peaks, torch.ones_like(peaks))
    for bits, parameter in quant.thresholds.items():
        if method == "minmax":
            best = peaks
        elif method == "percentile":
            best = torch.quantile(rows.abs(), percentile / 100, dim=1)
            best = torch.where(best > 0, best, peaks)
        else:
            best = _mse_thresholds(rows, peaks, quant.levels(int(bits)), quant.steps_per_threshold(int(bits)))
        with torch.no_grad():
            parameter.copy_(best.view_as(parameter))


def _mse_thresholds(rows: Tensor, peaks: Tensor, levels: tuple[int, int], steps: int) -> Tensor:
    """The thresholds (rows,) with the least squared error."""

    def error(shares: Tensor) -> Tensor:
        scale = (peaks * shares / steps)[:, None]
        return (rows / scale).round_().clamp_(*levels).mul_(scale).sub_(rows).square_().sum(1)

    best, least = torch.ones_like(peaks), torch.full_like(peaks, torch.inf)
    for candidates in (_COARSE, _FINE):
        center = torch.zeros_like(peaks) if candidates is _COARSE else best
        for offset in candidates:
            shares = (center + offset).clamp(0.01, 1.0)
            found = error(shares)
            best, least = torch.where(found < least, shares, best), torch.minimum(found, least)
    return peaks * best
