"""What figures stand for beside the paper's: how an attack was made, and whether training met its like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qadtr_brevitas.evaluation import evaluate
from qadtr_brevitas.evaluation.entries import NamedPatch
from qadtr_brevitas.evaluation.report import DataFacts
from qadtr_brevitas.reproduce.analyses.document import AnalysisReport, RecordFacts
from qadtr_brevitas.reproduce.page.measures import (
    AT_FLOAT,
    WHITE_BOX,
    Measure,
    ModelNames,
    analysis_measures,
    report_measures,
)
from qadtr_brevitas.reproduce.page.parts import AnalysisInput, StudyRow
from tests.evaluation.fakes import make_grid, reader, white_patch

ROWS = {"seen": StudyRow(label="a", evaluation="main"), "unseen": StudyRow(label="a", evaluation="unseen")}
BOTH = {WHITE_BOX, AT_FLOAT}


def patch(name: str, at: str, *, model: str = "net") -> NamedPatch:
    """A patch said to be made on the network, or one like it with a bit-width more, at a precision."""
    made = white_patch(name, model=model)
    return replace(made, patch=replace(made.patch, meta={**made.patch.meta, "precision": at}))


def measures(folder: Path, *patches: NamedPatch, row: str) -> dict[tuple[str, str], Measure]:
    """The success rates by the precision that a patch was made at and the one attacked."""
    report = evaluate(make_grid([reader("net")], patches), output=folder)
    names = ModelNames({"net": ROWS[row]}, {})
    made = {facts.name: facts.source.precision for facts in report.patches if facts.source}
    found = [measure for measure in report_measures(report, names) if measure.what == "asr"]
    cells = [cell for cell in report.cells if cell.threat != "control"]
    return {(made[cell.attack], cell.precision): measure for cell, measure in zip(cells, found, strict=True)}


@pytest.mark.parametrize("row", ["seen", "unseen"])
@pytest.mark.parametrize(
    "names",
    [
        ("lavan on net at 8+4 to 2", "lavan on net at 6 to 2"),
        ("unseen disc on net at 8+4 to 2", "unseen disc on net at 6 to 2"),
    ],
)
def test_means_over_precisions_and_foreign_ones_are_neither(tmp_path: Path, row: str, names: tuple[str, str]) -> None:
    beside = patch("unseen left-out-bits on net at 3 to 2", "3", model="wider")
    found = measures(tmp_path, patch(names[0], "8+4"), patch(names[1], "6"), beside, row=row)
    for precision in ("8", "4"):
        assert not found["8+4", precision].made
        assert not found["6", precision].made


@pytest.mark.parametrize("name", ["unseen left-out-bits on net at 3 to 2", "unseen-left-out-bits-4x4-3bit-target2"])
def test_bits_that_were_left_out_stand_in_every_column_of_unseen_patches(tmp_path: Path, name: str) -> None:
    patches = [patch(name, "3", model="wider"), patch("unseen disc on net at 8 to 2", "8")]
    found = measures(tmp_path / "unseen", *patches, row="unseen")
    assert found["3", "8"].made == found["3", "4"].made == BOTH
    assert (found["8", "8"].made, found["8", "4"].made) == ({WHITE_BOX}, set())
    assert not measures(tmp_path / "seen", *patches, row="seen")["3", "8"].made


def test_patches_of_a_row_said_to_be_unseen_need_no_name(tmp_path: Path) -> None:
    found = measures(tmp_path, patch("a", "3"), patch("b", "8+4"), row="unseen")
    assert found["3", "8"].made == BOTH
    assert not found["8+4", "8"].made
    assert {measure.facets["patches"] for measure in found.values()} == {"unseen"}


def test_attacks_beside_the_protocol_are_seen(tmp_path: Path) -> None:
    found = measures(
        tmp_path, patch("gap on net at 8 to 2", "8"), patch("unseen gap on net at 4 to 2", "4"), row="unseen"
    )
    assert {made: measure.facets["patches"] for (made, _), measure in found.items()} == {"8": "seen", "4": "unseen"}


def test_the_paper_names_attacks_without_their_settings(tmp_path: Path) -> None:
    def facets(**told: Any) -> Mapping[str, str]:
        record = RecordFacts(model="a", precision="8", what="asr", value=0.5, facets=told)
        report = AnalysisReport(
            analysis="spatial",
            title="",
            settings={},
            made_of="",
            created="",
            command="",
            versions={},
            seed=0,
            device="cpu",
            data=DataFacts(name="x", images=1, available=1, image_size=(8, 8), classes=("a",), fingerprint=""),
            models=(),
            records=(record,),
            tables=(),
            pictures=(),
        )
        (found,) = analysis_measures(AnalysisInput(tmp_path, report), ModelNames({}, {}))
        return found.facets

    assert facets(attack="lavan 6x6 init=image", shift=2, degrees=0)["attack"] == "lavan"
    assert "attack" not in facets(layer="conv1")
