from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from qadtr_brevitas.config import CalibrationSection
from qadtr_brevitas.core.errors import DataError
from qadtr_brevitas.data.shapes import Shapes
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.pipeline import calibration
from qadtr_brevitas.pipeline.calibration import CalibrationBatches, calibrate_on, calibration_count
from qadtr_brevitas.quant.bias_correction import BiasCorrection
from qadtr_brevitas.quant.range_methods import Percentile
from tests.evaluation.models import make_switchable, train_split


def blank(count: int, side: int) -> Split:
    return Split(torch.zeros(count, 3, side, side, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64), ("a",))


@pytest.mark.parametrize(
    ("samples", "available", "count"),
    [(None, 2000, 512), (None, 60, 60), (None, 16, 16), (16, 60, 16), (60, 60, 60), (1000, 2000, 1000)],
)
def test_how_many_images_are_looked_at(samples: int | None, available: int, count: int) -> None:
    assert calibration_count(CalibrationSection(samples=samples), available) == count


@pytest.mark.parametrize(
    ("samples", "available", "message"),
    [
        (None, 15, "calibration needs at least 16 training images, there are 15: add some"),
        (64, 60, "quant.calibration.samples is 64.* 60 training images"),
    ],
)
def test_too_few_images(samples: int | None, available: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        calibration_count(CalibrationSection(samples=samples), available)


@pytest.mark.parametrize(("side", "size"), [(16, 128), (32, 128), (224, 20), (299, 11), (1200, 1)])
def test_batches_are_bounded_and_made_when_asked_for(side: int, size: int) -> None:
    count = 3 if side == 1200 else 130
    batches = CalibrationBatches(blank(count, side), torch.device("cpu"))
    assert len(batches) == -(-count // size)
    assert batches[0].shape == (size, 3, side, side)
    assert len(batches[len(batches) - 1]) == count - size * (len(batches) - 1)


def test_every_image_is_in_one_batch() -> None:
    images = Shapes(image_size=8, train_images=300).load("train")
    batches = CalibrationBatches(images, torch.device("cpu"))
    assert torch.equal(torch.cat(list(batches)), images.images.float() / 255)


@pytest.mark.slow
def test_settings_reach_the_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def calibrate(model: object, batches: Sequence[Tensor], **settings: Any) -> None:
        asked.update(settings, images=sum(map(len, batches)))

    monkeypatch.setattr(calibration, "calibrate", calibrate)
    method = {"name": "percentile", "percentile": 99.5}
    section = CalibrationSection(method=method, samples=20, weights=["bias-correction"])
    calibrate_on(make_switchable(), train_split(), section, seed=0, progress=print)
    assert asked == {
        "method": Percentile(percentile=99.5),
        "weights": (BiasCorrection(),),
        "progress": print,
        "images": 20,
    }


def test_progress_is_of_the_whole_calibration() -> None:
    told: list[tuple[int, int]] = []
    calibrate_on(
        make_switchable(),
        train_split(),
        CalibrationSection(samples=20),
        seed=0,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told[-1][0] == told[-1][1] > 0
    assert told == sorted(told)
    assert len({total for _, total in told}) == 1


def test_a_model_of_32_bit_alone_needs_no_images() -> None:
    model = make_switchable(precisions=(32, 4))
    model.switch.allowed = model.switch.allowed[:1]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    calibrate_on(model, blank(1, 8), CalibrationSection(), seed=0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
