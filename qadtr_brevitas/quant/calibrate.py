"""Setting quantizer ranges from data, without training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sized
from typing import get_args

import torch
from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.quant.bias_correction import (
    correct_biases,
    corrected_precisions,
    output_means,
    reset_bias_correction,
)
from qadtr_brevitas.quant.norm import copy_float_statistics
from qadtr_brevitas.quant.quantizers import SwitchableActQuant, SwitchableQuant, SwitchableWeightQuant
from qadtr_brevitas.quant.ranges import Method, Observations, Sample, all_of, least_error, percentiles, thinned
from qadtr_brevitas.quant.switch import Observer, observing


def calibrate(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    method: Method = "mse",
    percentile: float = 99.99,
    bias_correction: bool = False,
    progress: Progress | None = None,
) -> None:
    """Sets the thresholds of every quantizer at every bit-width, and gives every precision the 32-bit norm statistics.

    The network runs in float, and each quantizer looks at what it would have to quantize. Weights have thresholds
    per output channel, activations one per tensor; ranges of dynamic quantizers are left to run time. Steps that have
    to be powers of two are chosen among these: `mse` the best, `minmax` and `percentile` the next one above.

    Args:
        model: a switchable model; changed in place.
        batches: images, each (N, C, H, W) in [0, 1]. Of those whose length is known, such as a list or an object
            that makes each batch when it is asked for, one is held at a time; others are read into a list first.
        method: `mse` minimizes the squared quantization error per bit-width (a grid search); `minmax` clips nothing
            that was seen, save that the steps of ReLU6 for hls4ml may end below 6; `percentile` clips what lies above
            a percentile of the magnitudes.
        percentile: for `percentile`, in (0, 100]; 100 is `minmax` on a sample.
        bias_correction: afterwards, for each precision, shift the outputs of convolutions and linear layers so that
            their means per channel are those of the float network (Nagel et al. 2019, section 4.2). Takes one more
            pass over the images per precision.
        progress: is called with the number of batches done, and of all in all passes.

    Raises:
        UsageError: no images, images on which the network computes no finite values, an unknown method, or a
            percentile out of range.
    """
    _check(method, percentile)
    batches = batches if isinstance(batches, Sized) else list(batches)
    if len(batches) == 0:
        raise UsageError("no images to calibrate on: give at least one batch")
    quantizers = [module for module in model.modules() if isinstance(module, SwitchableActQuant) and module.thresholds]
    observed = Observations(quantizers, len(batches), sampled=method != "minmax")
    count_batch = _counter(progress, len(batches) * (1 + bias_correction * len(corrected_precisions(model))))
    reset_bias_correction(model)
    observer = _observer(observed, method, percentile)
    with observing(model, observer), output_means(model, enabled=bias_correction) as means:
        for images in batches:
            model(images)
            count_batch()
    for quantizer in observed:
        _set_thresholds(quantizer, observed.seen_by(quantizer), method, percentile)
    copy_float_statistics(model)
    if bias_correction:
        correct_biases(model, batches, means, count_batch)


def _check(method: str, percentile: float) -> None:
    if method not in get_args(Method):
        raise UsageError(f"calibration method {method!r} is not known: choose mse, minmax or percentile")
    if not 0 < percentile <= 100:
        raise UsageError(f"percentile is {percentile}: it must be above 0 and at most 100, e.g. 99.99")


def _counter(progress: Progress | None, total: int) -> Callable[[], None]:
    """A function to call after each batch, which passes their number on."""
    done = itertools.count(1)

    def count_batch() -> None:
        if progress is not None:
            progress(next(done), total)

    return count_batch


def _observer(observed: Observations, method: Method, percentile: float) -> Observer:
    """Sets thresholds of weights where they are first seen, and collects what quantizers of activations see."""
    weights: set[SwitchableQuant] = set()

    def observe(quantizer: SwitchableQuant, x: Tensor) -> None:
        if not quantizer.thresholds or quantizer in weights:
            return
        # A module that quantizes its own products watches every function its forward calls; these are none of them.
        with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
            if isinstance(quantizer, SwitchableWeightQuant):
                # At once, so that no second copy of all weights is ever held.
                _set_weight_thresholds(quantizer, x.detach(), method, percentile)
                weights.add(quantizer)
            else:
                observed.add(quantizer, x.detach())

    return observe


def _set_weight_thresholds(quantizer: SwitchableQuant, weight: Tensor, method: Method, percentile: float) -> None:
    """Sets the thresholds of a weight quantizer, per output channel or one for all."""
    rows = weight.float().reshape(math.prod(quantizer.shape), -1)
    _set_thresholds(quantizer, all_of(rows), method, percentile)


def _set_thresholds(quantizer: SwitchableQuant, sample: Sample, method: Method, percentile: float) -> None:
    """Sets the thresholds of one quantizer at every bit-width."""
    reached = sample.largest
    if method == "mse":
        sample = thinned(sample)
    elif method == "percentile":
        clipped = percentiles(sample.rows, percentile)
        reached = torch.where(clipped > 0, clipped, reached)
    # What is always 0 needs some step, which is any.
    reached = torch.where(reached > 0, reached, 1.0)
    for name, parameter in quantizer.thresholds.items():
        bits = int(name)
        # Rounded to powers of two afterwards, steps would clip up to 29 % of what they were chosen for.
        threshold = quantizer.threshold_above(reached * quantizer.headroom(bits), bits)
        if method == "mse":
            levels, steps = quantizer.levels(bits), quantizer.steps_per_threshold(bits)
            threshold = least_error(
                sample, threshold, levels, steps, halves=quantizer.quantizer.halving, rounding=quantizer.quantizer.round
            )
        with torch.no_grad():
            parameter.copy_(threshold.view_as(parameter))
