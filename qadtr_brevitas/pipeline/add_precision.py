"""Add a precision to a trained model by calibration alone; nothing changes at the precisions that it has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from qadtr_brevitas.config import CalibrationSection
from qadtr_brevitas.core.precision import FLOAT_BITS, Precision
from qadtr_brevitas.core.seeding import generator
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.models.create import create_float_model
from qadtr_brevitas.pipeline.calibration import CalibrationBatches, calibrate_on
from qadtr_brevitas.pipeline.checkpoint import convert_again, load_model, save_model
from qadtr_brevitas.quant import SwitchableModel, allowed_precisions, recalibrate_norms
from qadtr_brevitas.quant.model_info import ModelInfo

_FLOAT = Precision(FLOAT_BITS, FLOAT_BITS)


def add_precision(source: Path, target: Path, precision: Precision, images: Split, *, seed: int) -> None:
    """Write a copy of a model directory with one more precision; at the others it computes the same.

    The thresholds of the new precision are calibrated, and its norm statistics are measured, on the images; the weights
    do not change. This measures how a network performs at a bit-width that it was never trained at.

    Args:
        source: a model or run directory.
        target: the model directory to write.
        precision: the precision to add; 32 bit, which calibration needs, is added with it.
        images: training images for calibration.
        seed: seed of their order, and of the choice of images for ranges if there are many.

    Raises:
        CheckpointError: there is no model, or the new one cannot be written.
        DataError: there are too few images for calibration.
    """
    model, info = load_model(source)
    trained = allowed_precisions(model)
    if precision in trained:
        save_model(target, model, info)
        return
    extended = _convert_again(info, tuple(dict.fromkeys((_FLOAT, *trained, precision))))
    own = model.state_dict()
    extended.load_state_dict(own, strict=False)
    section = CalibrationSection()
    # In random order, because norm statistics of batches sorted by class are wrong.
    images = images.subset(torch.randperm(len(images), generator=generator(seed, "widen")))
    batches = CalibrationBatches(images, torch.device("cpu"))
    if _FLOAT not in trained:
        # Training at other precisions never updated the statistics of 32 bit.
        recalibrate_norms(extended, batches, precisions=[_FLOAT])
    floats = {name: value.clone() for name, value in extended.state_dict().items()}
    calibrate_on(extended, images, section, seed=seed)
    # Calibration overwrites every precision, so those that were trained are restored.
    extended.load_state_dict({name: floats[name] for name in own}, strict=False)
    recalibrate_norms(extended, batches, precisions=[precision])
    save_model(target, extended, replace(info, source=f"{info.source}, calibrated at {precision} bit".lstrip(", ")))


def _convert_again(info: ModelInfo, precisions: tuple[Precision, ...]) -> SwitchableModel:
    net = create_float_model(info.name, num_classes=info.num_classes, args=info.args)
    return convert_again(net, info, precisions=precisions).eval()
