from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.reproduce.analyses import run_analysis
from qadtr_brevitas.reproduce.analyses.document import AnalysisReport, read_analysis
from qadtr_brevitas.reproduce.analyses.features import Features, change_at, choose_layers, covered_cells, recorded
from tests.reproduce.analyses.support import LAVAN, analyze, make_subjects, shapes, values

FAST = Features(attack=LAVAN, images=6)


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> list[LoadedModel]:
    return make_subjects(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def report(subjects: list[LoadedModel], tmp_path_factory: pytest.TempPathFactory) -> AnalysisReport:
    return analyze(FAST, subjects, tmp_path_factory.mktemp("whole"))


def test_the_first_three_convolutions_at_every_precision(report: AnalysisReport) -> None:
    layers = list(dict.fromkeys(record.facets["layer"] for record in report.records))
    assert layers == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    assert len(report.records) == 3 * 3 * 2
    assert [picture.file for picture in report.pictures] == ["features-net0.png"]


def test_a_patch_changes_the_first_map_where_it_lies(report: AnalysisReport) -> None:
    for precision in ("32", "4"):
        (at,) = values(report, "change at the patch", layer="conv1", precision=precision)
        (away,) = values(report, "change away from it", layer="conv1", precision=precision)
        assert at.value
        assert away.value is not None
        assert at.value > 5 * away.value
    (own,) = values(report, "cosine of the change", layer="conv1", precision="32")
    (few,) = values(report, "cosine of the change", layer="conv1", precision="4")
    assert own.value == pytest.approx(1)
    assert few.value is not None
    assert 0.5 < few.value < 1


def test_batches_of_any_size_give_the_same(report: AnalysisReport, subjects: list[LoadedModel], tmp_path: Path) -> None:
    parts = read_analysis(run_analysis(FAST, subjects, shapes(), tmp_path / "parts", seed=0, batch_size=4))
    for one, other in zip(report.records, parts.records, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-4)


def test_layers_are_chosen_by_name(subjects: list[LoadedModel], tmp_path: Path) -> None:
    report = analyze(Features(attack=LAVAN, images=3, layers=("layer3.0.conv1",)), subjects, tmp_path)
    assert {record.facets["layer"] for record in report.records} == {"layer3.0.conv1"}


def test_an_unknown_layer_is_answered_with_the_nearest_before_anything_is_made(
    subjects: list[LoadedModel], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"model net0 has no layer 'layer1\.0\.conv3': did you mean 'layer1\.0\.conv"):
        analyze(Features(attack=LAVAN, layers=("layer1.0.conv3",)), subjects, tmp_path)
    assert not list(tmp_path.iterdir())


def test_names_like_none_are_answered_with_some_layers_and_no_quantizers(subjects: list[LoadedModel]) -> None:
    with pytest.raises(UsageError, match=r"choose from conv1, bn1, act1, layer1, layer1\.0, .* and \d+ more") as caught:
        choose_layers(subjects[0].model, ("?",), of="model net0")
    assert "quant" not in str(caught.value)


def test_a_layer_that_puts_out_no_map_is_refused(subjects: list[LoadedModel], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"layer 'linear' puts out \(6, 3\), not a map"):
        analyze(Features(attack=LAVAN, images=6, layers=("linear",)), subjects, tmp_path)


def test_a_network_without_convolutions_needs_names() -> None:
    with pytest.raises(UsageError, match=r"toy has no convolutions: choose layers=\[...\] from 0"):
        choose_layers(nn.Sequential(nn.Linear(2, 2)), (), of="toy")


def test_hooks_are_gone_after_the_block() -> None:
    layer = nn.Conv2d(3, 2, 1)
    with recorded({"conv": layer}) as outputs:
        layer(torch.ones(1, 3, 2, 2))
    assert outputs["conv"].shape == (1, 2, 2, 2)
    assert not layer._forward_hooks


def test_cells_that_a_patch_touches_count_as_covered() -> None:
    covered = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    covered[0, 0, 3, 3] = True
    assert covered_cells(covered, (4, 4)).nonzero().tolist() == [[0, 0, 1, 1]]
    assert covered_cells(covered, (8, 8)).equal(covered)


def test_change_is_a_share_of_the_clean_map() -> None:
    clean, change = torch.full((1, 2, 2, 2), 4.0), torch.zeros(1, 2, 2, 2)
    change[..., 0, 0] = -2
    region = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    region[..., 0, 0] = True
    assert change_at(change, clean, region).tolist() == [0.5]
    assert change_at(change, clean, ~region).tolist() == [0]
    assert change_at(change, 0 * clean, region).isnan().all()
