"""Calibrate quantizer ranges on images of a data set, as a recipe describes it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qadtr_brevitas.config import CalibrationSection
from qadtr_brevitas.core.errors import DataError
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.quant import SwitchableModel, allowed_precisions, calibrate

DEFAULT_IMAGES, FEWEST_IMAGES = 512, 16

# The most pixels and images of a batch: 128 images of 32x32, 20 of 224x224.
_BATCH_PIXELS, _BATCH_IMAGES = 1 << 20, 128


def calibrate_on(
    model: SwitchableModel,
    images: Split,
    section: CalibrationSection,
    *,
    seed: int,
    progress: Progress | None = None,
) -> None:
    """Set the quantizer ranges of every precision, in place, from some of the images.

    Args:
        model: a switchable model; with 32 bit as its only precision there is nothing to set.
        images: training images.
        section: how many of them to use, and the methods.
        seed: seed of the choice of images.
        progress: called with the batches done and the batches in all, over all passes of calibration.

    Raises:
        DataError: as in `calibration_count`.
    """
    if all(precision.is_float for precision in allowed_precisions(model)):
        return
    chosen = images.balanced(calibration_count(section, len(images)), seed=seed)
    calibrate(
        model,
        CalibrationBatches(chosen, next(model.parameters()).device),
        method=section.method,
        weights=section.weights,
        progress=progress,
    )


def calibration_count(section: CalibrationSection, available: int) -> int:
    """Return how many of the training images calibration uses.

    Raises:
        DataError: there are fewer than the section sets, or too few to estimate a range.
    """
    if available < FEWEST_IMAGES:
        raise DataError(f"calibration needs at least {FEWEST_IMAGES} training images, there are {available}: add some")
    wanted = min(DEFAULT_IMAGES, available) if section.samples is None else section.samples
    if wanted > available:
        raise DataError(
            f"quant.calibration.samples is {wanted}, but there are only {available} training images: "
            f"set it to {available} or less"
        )
    return wanted


class CalibrationBatches(Sequence[Tensor]):
    """Batches of images (n, 3, H, W) in [0, 1], converted to float one at a time to save memory.

    Args:
        images: the images.
        device: device of the batches.
    """

    def __init__(self, images: Split, device: torch.device) -> None:
        height, width = images.image_size
        size = min(_BATCH_IMAGES, max(1, _BATCH_PIXELS // (height * width)))
        self.images, self.device = images, device
        self.indices = torch.arange(len(images)).split(size)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.images.batch(self.indices[index], device=self.device)[0]
