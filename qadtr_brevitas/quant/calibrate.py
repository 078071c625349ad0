"""Calibration: quantizer thresholds and norm statistics from images, without training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.core.registry import PTQ_METHODS, RANGE_METHODS
from qadtr_brevitas.data.batches import ImageBatches, Loader
from qadtr_brevitas.quant.feature_clip import calibrate_feature_clips, clip_passes, feature_clips
from qadtr_brevitas.quant.norm import copy_float_statistics
from qadtr_brevitas.quant.observations import Observations
from qadtr_brevitas.quant.ptq import PtqMethod, PtqRun, ptq_states
from qadtr_brevitas.quant.range_methods import LevelGrid, RangeMethod
from qadtr_brevitas.quant.ranges import Sample, all_of
from qadtr_brevitas.quant.switch import Observer, observing, switch_of
from qadtr_brevitas.quant.switchable_quant import SwitchableActQuant, SwitchableQuant, SwitchableWeightQuant


@torch.inference_mode(False)
def calibrate(
    model: nn.Module,
    loader: Loader,
    *,
    method: RangeMethod | str | Mapping[str, Any] = "mse",
    weights: Sequence[PtqMethod | str | Mapping[str, Any]] = (),
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
        method: how a range is chosen, an object, a name, or a name and its keys: `mse` minimizes the squared
            quantization error per bit-width (a grid search); `minmax` clips no value that was observed, except that a
            ReLU6 whose steps are powers of two may clip below 6; `{"name": "percentile", "percentile": 99.9}` clips the
            values above a percentile of the magnitudes.
        weights: PTQ methods that run afterwards, in order, given likewise: `gptq`, `bias-correction`; `equalize` and
            `magr` run before. What they set in an earlier calibration is removed.
        progress: called after each batch with the number of batches done and that of all passes.

    Raises:
        UsageError: the model is not switchable, a method is unknown or its keys are out of range, or the network
            computes values that are not finite on the images.
        PluginError: a method of another package cannot be loaded.
        DataError: the loader has no images, or a batch is not images in [0, 1].
    """
    switch_of(model)
    ranges: RangeMethod = RANGE_METHODS.make(method)
    improvements: list[PtqMethod] = [PTQ_METHODS.make(value) for value in weights]
    batches = ImageBatches(loader, device=next(model.parameters()).device)
    for state in (*ptq_states(model), *feature_clips(model)):
        state.reset()
    for improvement in improvements:
        improvement.prepare(model)
    runs = [improvement.start(model) for improvement in improvements]
    passes = 1 + sum(run.passes for run in runs) + clip_passes(model)
    count_batch = _counter(progress, len(batches) * passes)
    for run in runs:
        run.rewrite(batches, count_batch)
    with ExitStack() as aiming:
        for run in runs:
            aiming.enter_context(run.aiming(batches, count_batch))
        _set_ranges(model, ranges, runs, batches, count_batch)
        copy_float_statistics(model)
        for run in runs:
            run.improve(batches, count_batch)
    calibrate_feature_clips(model, batches, count_batch)


def _set_ranges(
    model: nn.Module,
    ranges: RangeMethod,
    runs: Sequence[PtqRun],
    batches: ImageBatches,
    count_batch: Callable[[], object],
) -> None:
    """Run the float network once, and set the thresholds of every quantizer."""
    quantizers = [module for module in model.modules() if isinstance(module, SwitchableActQuant) and module.thresholds]
    observed = Observations(quantizers, len(batches), sampled=ranges.needs_values)
    with observing(model, _observer(observed, ranges)), ExitStack() as watching:
        for run in runs:
            watching.enter_context(run.watching_float())
        for images in batches:
            model(images)
            count_batch()
    for quantizer in observed:
        _set_thresholds(quantizer, observed.seen_by(quantizer), ranges)


def _counter(progress: Progress | None, total: int) -> Callable[[], None]:
    """Return a function to call after each batch, which reports their number."""
    done = itertools.count(1)

    def count_batch() -> None:
        if progress is not None:
            progress(next(done), total)

    return count_batch


def _observer(observed: Observations, method: RangeMethod) -> Observer:
    """Return an observer that sets the thresholds of weights and samples the activations."""
    weights: set[SwitchableQuant] = set()

    def observe(quantizer: SwitchableQuant, x: Tensor) -> None:
        if not quantizer.thresholds or quantizer in weights:
            return
        # The functions called here are not part of a module that quantizes its own products.
        with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
            if isinstance(quantizer, SwitchableWeightQuant):
                # At once, so that there is never a second copy of all weights.
                wanted = None if quantizer.rounding is None else quantizer.rounding.wanted
                weight = x.detach() if wanted is None else wanted
                rows = weight.float().reshape(math.prod(quantizer.shape), -1)
                _set_thresholds(quantizer, all_of(rows), method)
                weights.add(quantizer)
            else:
                observed.add(quantizer, x.detach())

    return observe


@torch.no_grad()
def _set_thresholds(quantizer: SwitchableQuant, sample: Sample, method: RangeMethod) -> None:
    """Set the thresholds of one quantizer at every bit-width, each from the values that it covers."""
    sample = method.reduced(sample)
    for bits, parameter in quantizer.thresholds.items():
        grid = LevelGrid(quantizer.scheme, quantizer.levels(int(bits)), quantizer.max_threshold)
        parameter.copy_(method.thresholds(sample, grid).view_as(parameter))
