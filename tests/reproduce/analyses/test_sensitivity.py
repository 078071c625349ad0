from __future__ import annotations

import json
from pathlib import Path

import pytest

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.models.create import create_float_model
from qadtr_brevitas.pipeline.checkpoint import convert_again
from qadtr_brevitas.reproduce.analyses.sensitivity import LAYERS_FILE, SensitivityAnalysis
from tests.reproduce.analyses.support import analyze, make_models, select

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    (loaded,) = make_models(tmp_path_factory.mktemp("models"), precisions=(32, 8, 4, 2))
    return loaded


def test_layers_of_a_model(model: LoadedModel, tmp_path: Path) -> None:
    report = analyze(SensitivityAnalysis(images=8), [model], tmp_path)
    found = select(report, "kl", precision="4")
    assert all(record.value is not None and record.value >= 0 and record.n == 8 for record in found)
    assert {record.facets["quantized"] for record in found} == {"weights", "activations"}
    assert (tmp_path / "sensitivity.png").is_file()
    assert not (tmp_path / LAYERS_FILE).exists()


@pytest.mark.parametrize("unit", ["B", "bop"])
def test_less_than_the_least_is_refused_with_the_least(model: LoadedModel, unit: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"fits into 1{unit}") as raised:
        analyze(SensitivityAnalysis(images=8, budget=f"1{unit}"), [model], tmp_path)
    assert not (tmp_path / LAYERS_FILE).exists()
    smallest = int(str(raised.value).rpartition("budget=")[2].partition(unit)[0])
    assert smallest > 1
    if unit == "B":
        assert smallest == model.model.report.sizes["2"]


def test_a_budget_is_kept_to_the_byte(model: LoadedModel, tmp_path: Path) -> None:
    sizes = model.model.report.sizes
    budget = (sizes["4"] + sizes["2"]) // 2
    report = analyze(SensitivityAnalysis(images=8, budget=f"{budget}B", name="small"), [model], tmp_path)
    (cost,) = select(report, "cost", precision="mixed:small")
    layers = json.loads((tmp_path / LAYERS_FILE).read_text())
    info = model.info
    net = create_float_model(info.name, num_classes=info.num_classes, args=info.args)
    converted = convert_again(net, info, layers=layers)
    assert converted.report.sizes["mixed:small"] == cost.value
    assert sizes["2"] < cost.value <= budget
    assert len({bits["weight"] for bits in layers["small"].values()}) > 1
