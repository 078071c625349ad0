"""Calibration: quantizer thresholds and norm statistics from images, without training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.data.batches import ImageBatches, Loader
from qadtr_brevitas.quant.bias_correction import (
    correct_biases,
    corrected_precisions,
    output_means,
    reset_bias_correction,
)
from qadtr_brevitas.quant.norm import copy_float_statistics
from qadtr_brevitas.quant.observations import Observations
from qadtr_brevitas.quant.ranges import Method, Sample, all_of, least_error, percentiles, thinned
from qadtr_brevitas.quant.switch import Observer, observing
from qadtr_brevitas.quant.switchable_quant import SwitchableActQuant, SwitchableQuant, SwitchableWeightQuant


def calibrate(
    model: nn.Module,
    loader: Loader,
    *,
    method: Method = "mse",
    percentile: float = 99.99,
    bias_correction: bool = False,
    progress: Progress | None = None,
) -> None:
    """Set the thresholds of every quantizer at every bit-width, and copy the 32-bit norm statistics to every precision.

    The network runs in float and eval mode, whatever its mode, and each quantizer observes the tensors that it would
    quantize. Weights have one threshold per output channel or as their quantizer says, activations one per tensor.
    Dynamic quantizers measure their ranges at run time. Where steps have to be powers of two, `mse` chooses the best of
    them, `minmax` and `percentile` the next one above.

    Args:
        model: a switchable model; changed in place.
        loader: images (N, C, H, W) in [0, 1] or uint8, with or without labels, which are ignored: a DataLoader, a list
            of batches, one tensor of images, or a dataset. One batch is in memory at a time, except that an iterator,
            which can be read only once, is read into a list first. Batches are moved to the model's device.
        method: `mse` minimizes the squared quantization error per bit-width (a grid search); `minmax` clips no value
            that was observed, except that a ReLU6 whose steps are powers of two may clip below 6; `percentile` clips
            the values above a percentile of the magnitudes.
        percentile: for `percentile`, in (0, 100]; 100 is `minmax` on a sample.
        bias_correction: afterwards, for each precision, shift the outputs of convolutions and linear layers so that
            their means per channel are those of the float network (Nagel et al. 2019, section 4.2). This takes one more
            pass over the images per precision.
        progress: called after each batch with the number of batches done and that of all passes.

    Raises:
        UsageError: the model is not switchable, the method is unknown, the percentile is out of range, or the network
            computes values that are not finite on the images.
        DataError: the loader has no images, or a batch is not images in [0, 1].
    """
    _check(method, percentile)
    batches = ImageBatches(loader, device=next(model.parameters()).device)
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
    """Return a function to call after each batch, which reports their number."""
    done = itertools.count(1)

    def count_batch() -> None:
        if progress is not None:
            progress(next(done), total)

    return count_batch


def _observer(observed: Observations, method: Method, percentile: float) -> Observer:
    """Return an observer that sets the thresholds of weights and samples the activations."""
    weights: set[SwitchableQuant] = set()

    def observe(quantizer: SwitchableQuant, x: Tensor) -> None:
        if not quantizer.thresholds or quantizer in weights:
            return
        # The functions called here are not part of a module that quantizes its own products.
        with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
            if isinstance(quantizer, SwitchableWeightQuant):
                # At once, so that there is never a second copy of all weights.
                _set_weight_thresholds(quantizer, x.detach(), method, percentile)
                weights.add(quantizer)
            else:
                observed.add(quantizer, x.detach())

    return observe


def _set_weight_thresholds(quantizer: SwitchableQuant, weight: Tensor, method: Method, percentile: float) -> None:
    """Set the thresholds of a weight quantizer, each from the values that it covers."""
    rows = weight.float().reshape(math.prod(quantizer.shape), -1)
    _set_thresholds(quantizer, all_of(rows), method, percentile)


def _set_thresholds(quantizer: SwitchableQuant, sample: Sample, method: Method, percentile: float) -> None:
    """Set the thresholds of one quantizer at every bit-width."""
    reached = sample.largest
    if method == "mse":
        sample = thinned(sample)
    elif method == "percentile":
        clipped = percentiles(sample.rows, percentile)
        reached = torch.where(clipped > 0, clipped, reached)
    # Values that are always 0 need some step; any will do.
    reached = torch.where(reached > 0, reached, 1.0)
    for name, parameter in quantizer.thresholds.items():
        bits = int(name)
        # Steps that were rounded to powers of two afterwards would clip up to 29 % of the range.
        threshold = quantizer.threshold_above(reached * quantizer.headroom(bits), bits)
        if method == "mse":
            scheme = quantizer.scheme
            threshold = least_error(
                sample,
                threshold,
                quantizer.levels(bits),
                quantizer.steps_per_threshold(bits),
                rounding=scheme.round,
                halves=scheme.doubling_thresholds,
            )
        with torch.no_grad():
            parameter.copy_(threshold.view_as(parameter))
