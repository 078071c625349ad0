"""A contract check of analyses, for those of this package and of other packages.

```python
from qadtr_brevitas.testing.analyses import check_analysis

def test_my_analysis(tmp_path):
    check_analysis(MyAnalysis(images=8), tmp_path)
```
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from qadtr_brevitas.core.files import fingerprint_tensors
from qadtr_brevitas.core.progress import silent
from qadtr_brevitas.core.seeding import generator
from qadtr_brevitas.data.digits import Digits
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.quant import SwitchableModel, calibrate, convert, frozen_weights
from qadtr_brevitas.quant.model_info import ModelInfo
from qadtr_brevitas.reproduce.analyses import Analysis, AnalysisContext, AnalysisData, Findings, Record

_PRECISIONS = (32, 4)
_TEST_IMAGES, _TRAIN_IMAGES, _TRAIN_STEPS = 40, 400, 60
_SIDE, _CLASSES = 32, 10
_GRAY = (0.5, 0.5, 0.5)
_SHARES = ("asr", "accuracy")
_PNG_SIGNATURE = b"\x89PNG"


def check_analysis(analysis: Analysis, folder: Path) -> Findings:
    """Run an analysis twice on a small network of the embedded digits, and check what it returns.

    The network is called `digits`, has three convolutions and the precisions 32 and 4. Choose settings that are fast:
    few images, few steps.

    Args:
        analysis: the analysis.
        folder: an empty folder for its files.

    Returns:
        The findings of the first run.

    Raises:
        AssertionError: the analysis breaks the contract; the message says how.
    """
    assert isinstance(analysis.patches, tuple), "`patches` must be a tuple of files and folders"
    loaded = _digits_model()
    loaded.model.zero_grad()
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    first = _run(analysis, loaded, folder / "first")
    _check_records(first.records, loaded.name)
    _check_tables(first)
    _check_pictures(first, folder / "first")
    second = _run(analysis, loaded, folder / "second")
    assert list(second.records) == list(first.records), "the same seed must give the same records"
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, before[name]), f"the analysis changed {name} of the model"
    grown = [name for name, value in loaded.model.named_parameters() if value.grad is not None]
    assert not grown, f"the analysis left gradients behind, the first at {grown[0]}"
    return first


def _run(analysis: Analysis, loaded: LoadedModel, output: Path) -> Findings:
    output.mkdir(parents=True)
    data = AnalysisData("digits", _digits("test", _TEST_IMAGES), load_train=lambda: _digits("train", _TRAIN_IMAGES))
    context = AnalysisContext([loaded], data, output, 0, torch.device("cpu"), 20, silent)
    with frozen_weights(loaded.model):
        return analysis.run(context)


def _check_records(records: Sequence[object], model: str) -> None:
    assert records, "an analysis must return records"
    known = {str(bits) for bits in _PRECISIONS}
    seen: set[tuple[object, ...]] = set()
    for record in records:
        assert isinstance(record, Record), f"{record!r} is not a Record"
        assert record.model == model, f"{record} is of the unknown model {record.model!r}"
        assert record.precision in known, f"{record} has a precision that the model does not have"
        _check_value(record)
        key = (record.precision, record.what, *sorted(record.facets.items()))
        assert key not in seen, f"two records have the same quantity, precision and facets: {record}"
        seen.add(key)


def _check_value(record: Record) -> None:
    if record.value is None:
        return
    assert math.isfinite(record.value), f"the value of {record} is not finite"
    assert record.n is None or record.n > 0, f"{record} has a value of no images"
    assert (record.low is None) == (record.high is None), f"{record} has half an interval"
    if record.low is not None and record.high is not None:
        assert record.low <= record.value <= record.high, f"the value of {record} is outside its interval"
    if record.what.startswith(_SHARES):
        assert 0 <= record.value <= 1, f"{record} is a share and must be in [0, 1]"


def _check_tables(findings: Findings) -> None:
    assert findings.title, "findings must have a title"
    assert findings.tables, "an analysis must return at least one table"
    for table in findings.tables:
        rows = [row for row in table.rows if row is not None]
        assert rows, f"table {table.title!r} is empty"
        for row in rows:
            assert len(row) == len(table.header), f"table {table.title!r} has a row of another length: {row}"


def _check_pictures(findings: Findings, folder: Path) -> None:
    for picture in findings.pictures:
        path = folder / picture.file
        assert path.is_file(), f"the picture {picture.file} was not drawn"
        assert path.read_bytes().startswith(_PNG_SIGNATURE), f"{picture.file} is not a PNG file"
        assert picture.caption, f"the picture {picture.file} has no caption"


@cache
def _digits(split: str, images: int) -> Split:
    return Digits().load(split, limit=images)


@cache
def _digits_model() -> LoadedModel:
    """Return a small network that classifies some of the digits correctly."""
    net = _trained(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * (_SIDE // 8) ** 2, _CLASSES),
        )
    )
    model: SwitchableModel = convert(net.eval(), _PRECISIONS, mean=_GRAY, std=_GRAY, image_size=(_SIDE, _SIDE))
    calibrate(model, [_train_batch(100)[0]])
    split = _digits("test", _TEST_IMAGES)
    info = ModelInfo(
        name="digits",
        args={},
        num_classes=_CLASSES,
        image_size=(_SIDE, _SIDE),
        classes=split.classes,
        mean=_GRAY,
        std=_GRAY,
        quant={"precisions": list(_PRECISIONS)},
    )
    return LoadedModel("digits", model.eval(), fingerprint_tensors(model.state_dict().values()), info)


def _train_batch(images: int) -> tuple[Tensor, Tensor]:
    return _digits("train", _TRAIN_IMAGES).batch(torch.arange(images))


def _trained(net: nn.Module) -> nn.Module:
    draws = generator(0, "contract check")
    for parameter in net.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, generator=draws)
        else:
            nn.init.zeros_(parameter)
    images, labels = _train_batch(_TRAIN_IMAGES)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(_TRAIN_STEPS):
        batch = torch.randint(len(images), (64,), generator=draws)
        loss = cross_entropy(net((images[batch] - _GRAY[0]) / _GRAY[0]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net
