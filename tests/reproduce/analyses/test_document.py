from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from qadtr_brevitas.attacks.pixel import Fgsm
from qadtr_brevitas.core.errors import CheckpointError
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.reproduce.analyses.document import read_analysis
from qadtr_brevitas.reproduce.analyses.pixel import Pixel
from tests.reproduce.analyses.support import analyze

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(models: list[LoadedModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pixel")
    analyze(Pixel(attacks=(Fgsm(),), eps=(0.0, 0.02)), models, folder)
    return folder


def test_the_csv_file_holds_every_record_with_its_facets(folder: Path) -> None:
    report = read_analysis(folder)
    with (folder / "records.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["what"] for line in lines] == [record.what for record in report.records]
    assert [float(line["value"]) for line in lines] == [record.value for record in report.records]
    assert [float(line["eps"]) for line in lines] == [record.facets["eps"] for record in report.records]
    assert {line["attack"] for line in lines} == {"fgsm"}


def test_a_missing_analysis_is_refused_with_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="qadtr-brevitas analyze"):
        read_analysis(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"), [({"schema_version": 99}, "version 99.*1 to 2"), ({"records": 3}, "damaged")]
)
def test_a_damaged_or_newer_file_is_refused(folder: Path, tmp_path: Path, change: dict[str, int], message: str) -> None:
    content = json.loads((folder / "analysis.json").read_text())
    (tmp_path / "analysis.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(CheckpointError, match=message):
        read_analysis(tmp_path)
