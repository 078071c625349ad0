"""A network at one precision more than it was trained for: by calibration, without touching what it has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qadtr_brevitas.config import CalibrationSection
from qadtr_brevitas.core.precision import FLOAT_BITS, Precision
from qadtr_brevitas.core.seeding import generator
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.models.create import create_float_model
from qadtr_brevitas.pipeline.calibration import CalibrationBatches, calibrate_on
from qadtr_brevitas.pipeline.checkpoint import load_model, save_model
from qadtr_brevitas.quant import SwitchableModel, allowed_precisions, convert, recalibrate_norms
from qadtr_brevitas.quant.model_info import ModelInfo

_FLOAT = Precision(FLOAT_BITS, FLOAT_BITS)


def add_precision(source: Path, target: Path, precision: Precision, images: Split, *, seed: int) -> None:
    """Writes a model directory like another, with one more precision; at the others it computes what that one does.

    The thresholds of the new precision are calibrated and its norm statistics measured on the images, with the weights
    as they are. What it shows is how a network does at a bit-width it was never trained at.

    Args:
        source: a model or run directory.
        target: the model directory to write.
        precision: the one to add; 32 bit, which calibration looks at, is added with it.
        images: training images to look at.
        seed: decides their order, and which of them ranges are calibrated on where there are many.

    Raises:
        CheckpointError: no model is there, or the new one cannot be written.
        DataError: too few images to calibrate on.
    """
    model, info = load_model(source)
    trained = allowed_precisions(model)
    if precision in trained:
        save_model(target, model, info)
        return
    wider = _converted(info, tuple(dict.fromkeys((_FLOAT, *trained, precision))))
    own = model.state_dict()
    wider.load_state_dict(own, strict=False)
    section = CalibrationSection()
    # In random order: norm statistics measured on batches sorted by class are wrong.
    images = images.subset(torch.randperm(len(images), generator=generator(seed, "widen")))
    batches = CalibrationBatches(images, torch.device("cpu"))
    if _FLOAT not in trained:
        # Training at other precisions left the statistics of 32 bit where they were.
        recalibrate_norms(wider, batches, precisions=[_FLOAT])
    floats = {name: value.clone() for name, value in wider.state_dict().items()}
    calibrate_on(wider, images, section, seed=seed)
    # Calibration sets every precision anew: those that were trained get back what they had.
    wider.load_state_dict({name: floats[name] for name in own}, strict=False)
    recalibrate_norms(wider, batches, precisions=[precision])
    save_model(target, wider, replace(info, source=f"{info.source}, calibrated at {precision} bit".lstrip(", ")))


def _converted(info: ModelInfo, precisions: tuple[Precision, ...]) -> SwitchableModel:
    net = create_float_model(info.name, num_classes=info.num_classes, args=info.args)
    settings: dict[str, Any] = {**info.quant, "precisions": precisions}
    wider = convert(net, mean=info.mean, std=info.std, image_size=info.image_size, in_place=True, **settings)
    return wider.eval()
