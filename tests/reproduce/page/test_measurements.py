"""Facets of measurements: where an attack was made, and whether its patches are unlike those of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qadtr_brevitas.evaluation import evaluate
from qadtr_brevitas.evaluation.entries import NamedPatch
from qadtr_brevitas.evaluation.report import DataFacts
from qadtr_brevitas.reproduce.analyses.document import AnalysisReport, Record
from qadtr_brevitas.reproduce.page.inputs import AnalysisInput
from qadtr_brevitas.reproduce.page.measurements import (
    AT_FLOAT,
    WHITE_BOX,
    Measurement,
    PaperNames,
    analysis_measurements,
    report_measurements,
)
from qadtr_brevitas.reproduce.page.study_file import StudyRow
from tests.evaluation.fakes import make_grid, reader, white_patch

ROWS = {"seen": StudyRow(label="a", evaluation="main"), "unseen": StudyRow(label="a", evaluation="unseen")}
BOTH = {WHITE_BOX, AT_FLOAT}


def patch(name: str, at: str, *, model: str = "net") -> NamedPatch:
    """Return a patch that records a model and a precision that it was made on."""
    made = white_patch(name, model=model)
    return replace(made, patch=replace(made.patch, meta={**made.patch.meta, "precision": at}))


def measure(folder: Path, *patches: NamedPatch, row: str) -> dict[tuple[str, str], Measurement]:
    """Return the success rates by the precision that a patch was made at and the one attacked."""
    report = evaluate(make_grid([reader("net")], patches), output=folder)
    names = PaperNames({"net": ROWS[row]}, {})
    made = {facts.name: facts.source.precision for facts in report.patches if facts.source}
    asr = [found for found in report_measurements(report, names) if found.what == "asr"]
    cells = [cell for cell in report.cells if cell.threat != "control"]
    return {(made[cell.attack], cell.precision): found for cell, found in zip(cells, asr, strict=True)}


@pytest.mark.parametrize("row", ["seen", "unseen"])
@pytest.mark.parametrize(
    "names",
    [
        ("lavan on net at 8+4 to 2", "lavan on net at 6 to 2"),
        ("unseen disc on net at 8+4 to 2", "unseen disc on net at 6 to 2"),
    ],
)
def test_patches_of_several_or_of_foreign_precisions_have_no_origin(
    tmp_path: Path, row: str, names: tuple[str, str]
) -> None:
    beside = patch("unseen left-out-bits on net at 3 to 2", "3", model="wider")
    found = measure(tmp_path, patch(names[0], "8+4"), patch(names[1], "6"), beside, row=row)
    for precision in ("8", "4"):
        assert not found["8+4", precision].origins
        assert not found["6", precision].origins


@pytest.mark.parametrize("name", ["unseen left-out-bits on net at 3 to 2", "unseen-left-out-bits-4x4-3bit-target2"])
def test_unseen_patches_of_a_left_out_precision_count_at_every_precision(tmp_path: Path, name: str) -> None:
    patches = [patch(name, "3", model="wider"), patch("unseen disc on net at 8 to 2", "8")]
    found = measure(tmp_path / "unseen", *patches, row="unseen")
    assert found["3", "8"].origins == found["3", "4"].origins == BOTH
    assert (found["8", "8"].origins, found["8", "4"].origins) == ({WHITE_BOX}, set())
    assert not measure(tmp_path / "seen", *patches, row="seen")["3", "8"].origins


def test_patches_of_an_unseen_row_need_no_protocol_name(tmp_path: Path) -> None:
    found = measure(tmp_path, patch("a", "3"), patch("b", "8+4"), row="unseen")
    assert found["3", "8"].origins == BOTH
    assert not found["8+4", "8"].origins
    assert {measured.facets["patches"] for measured in found.values()} == {"unseen"}


def test_attacks_beside_those_of_the_protocol_count_as_seen(tmp_path: Path) -> None:
    found = measure(
        tmp_path, patch("gap on net at 8 to 2", "8"), patch("unseen gap on net at 4 to 2", "4"), row="unseen"
    )
    assert {made: measured.facets["patches"] for (made, _), measured in found.items()} == {"8": "seen", "4": "unseen"}


def test_attacks_of_an_analysis_lose_their_settings(tmp_path: Path) -> None:
    def facets(**values: Any) -> Mapping[str, str]:
        record = Record(model="a", precision="8", what="asr", value=0.5, facets=values)
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
        (found,) = analysis_measurements(AnalysisInput(tmp_path, report), PaperNames({}, {}))
        return found.facets

    assert facets(attack="lavan 6x6 init=image", shift=2, degrees=0)["attack"] == "lavan"
    assert "attack" not in facets(layer="conv1")
