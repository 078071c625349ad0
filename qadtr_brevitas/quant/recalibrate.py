"""Norm statistics measured anew, per precision."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from qadtr_brevitas.errors import UsageError
from qadtr_brevitas.precision import PrecisionLike
from qadtr_brevitas.quant.norm import SwitchableBatchNorm, norms
from qadtr_brevitas.quant.switch import at_precision, evaluating, precisions_or_all


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
    for precision in precisions_or_all(model, precisions):
        with evaluating(model), at_precision(model, precision), _averaging(layers) as count_batch:
            count = 0
            for count, images in enumerate(batches, start=1):
                count_batch(count)
                model(images)
        if count == 0:
            raise UsageError("no images to measure norm statistics on: give at least one batch")


@contextmanager
def _averaging(layers: Sequence[SwitchableBatchNorm]) -> Generator[Callable[[int], None]]:
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
