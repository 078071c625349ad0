from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.reproduce.analyses import run_analysis
from qadtr_brevitas.reproduce.analyses.document import AnalysisReport, read_analysis
from qadtr_brevitas.reproduce.analyses.features import Features, covered_cells, relative_change
from tests.reproduce.analyses.support import LAVAN, analyze, select, shapes

FAST = Features(attack=LAVAN, images=6)


@pytest.fixture(scope="module")
def report(models: list[LoadedModel], tmp_path_factory: pytest.TempPathFactory) -> AnalysisReport:
    return analyze(FAST, models, tmp_path_factory.mktemp("whole"))


@pytest.mark.slow
def test_the_first_three_convolutions_are_measured_at_every_precision(report: AnalysisReport) -> None:
    layers = list(dict.fromkeys(record.facets["layer"] for record in report.records))
    assert layers == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    assert len(report.records) == 3 * 3 * 2
    assert [picture.file for picture in report.pictures] == ["features-net0.png"]


@pytest.mark.slow
def test_a_patch_changes_the_first_map_where_it_lies(report: AnalysisReport) -> None:
    for precision in ("32", "4"):
        (at,) = select(report, "change at the patch", layer="conv1", precision=precision)
        (away,) = select(report, "change away from it", layer="conv1", precision=precision)
        assert at.value
        assert away.value is not None
        assert at.value > 5 * away.value
    (same,) = select(report, "cosine of the change", layer="conv1", precision="32")
    (quantized,) = select(report, "cosine of the change", layer="conv1", precision="4")
    assert same.value == pytest.approx(1)
    assert quantized.value is not None
    assert 0.5 < quantized.value < 1


@pytest.mark.slow
def test_the_batch_size_does_not_change_the_numbers(
    report: AnalysisReport, models: list[LoadedModel], tmp_path: Path
) -> None:
    parts = read_analysis(run_analysis(FAST, models, shapes(), tmp_path / "parts", seed=0, batch_size=4))
    for one, other in zip(report.records, parts.records, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-4)


@pytest.mark.slow
def test_layers_are_chosen_by_name(models: list[LoadedModel], tmp_path: Path) -> None:
    report = analyze(Features(attack=LAVAN, images=3, layers=("layer3.0.conv1",)), models, tmp_path)
    assert {record.facets["layer"] for record in report.records} == {"layer3.0.conv1"}


def test_cells_that_a_patch_touches_count_as_covered() -> None:
    covered = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    covered[0, 0, 3, 3] = True
    assert covered_cells(covered, (4, 4)).nonzero().tolist() == [[0, 0, 1, 1]]
    assert covered_cells(covered, (8, 8)).equal(covered)


def test_the_change_is_a_share_of_the_clean_map() -> None:
    clean, change = torch.full((1, 2, 2, 2), 4.0), torch.zeros(1, 2, 2, 2)
    change[..., 0, 0] = -2
    region = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    region[..., 0, 0] = True
    assert relative_change(change, clean, region).tolist() == [0.5]
    assert relative_change(change, clean, ~region).tolist() == [0]
    assert relative_change(change, 0 * clean, region).isnan().all()
