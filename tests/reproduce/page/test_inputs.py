from __future__ import annotations

import json
from pathlib import Path

import pytest

from qadtr_brevitas.core.errors import CheckpointError, UsageError
from qadtr_brevitas.evaluation.report.files import write_report
from qadtr_brevitas.reproduce.page import read_inputs
from qadtr_brevitas.reproduce.page.inputs import ReportInput, StudyInput
from tests.evaluation.fakes import coded_split
from tests.reproduce.page.support import make_audit, make_report, make_study


def test_a_study_brings_its_reports_and_their_audits(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    make_report(study / "seen")
    make_audit(study / "seen", model="b", fingerprint="b-weights")
    (found,) = read_inputs([study])
    assert isinstance(found, StudyInput)
    assert [model.name for model in found.reports[0].report.models] == ["a", "b"]
    assert [audit.model for audit in found.reports[0].audits] == ["b"]


def test_an_audit_of_other_weights_is_left_out(tmp_path: Path) -> None:
    make_report(tmp_path)
    make_audit(tmp_path, model="a", fingerprint="earlier weights")
    (found,) = read_inputs([tmp_path])
    assert isinstance(found, ReportInput)
    assert found.audits == ()


def test_pictures_and_tables_of_an_earlier_report_are_removed_with_it(tmp_path: Path) -> None:
    def pictures() -> list[str]:
        (found,) = read_inputs([tmp_path])
        assert isinstance(found, ReportInput)
        return sorted(path.name for path in found.pictures)

    def draw(*names: str) -> list[Path]:
        for name in names:
            (tmp_path / name).write_bytes(b"png")
        return [tmp_path / name for name in names]

    # Files in a folder without a report are not removed.
    draw("patches.png")
    report = make_report(tmp_path)
    assert pictures() == ["patches.png"]
    write_report(report, tmp_path, pictures=draw("asr.png", "patches.png", "examples-a.png", "examples-b.png"))
    (tmp_path / "certified.csv").write_text("of the earlier report")
    (tmp_path / "notes.png").write_bytes(b"of someone else")
    write_report(report, tmp_path, pictures=draw("asr.png", "examples-b.png"))
    assert pictures() == ["asr.png", "examples-b.png"]
    assert not (tmp_path / "certified.csv").exists()
    write_report(report, tmp_path)
    assert pictures() == []
    assert (tmp_path / "notes.png").is_file()


def test_folders_that_cannot_be_read_are_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"study\.json, analysis\.json or report\.json"):
        read_inputs([tmp_path])
    (tmp_path / "cells").mkdir()
    with pytest.raises(UsageError, match=r"unfinished.*resume"):
        read_inputs([tmp_path])
    with pytest.raises(UsageError, match="nowhere"):
        read_inputs([tmp_path / "nowhere"])
    with pytest.raises(UsageError, match="is given twice"):
        read_inputs([tmp_path, tmp_path / "cells" / ".."])


def test_reports_of_other_versions_and_damaged_files(tmp_path: Path) -> None:
    make_report(tmp_path)
    (tmp_path / "audit.json").write_text("[3]")
    with pytest.raises(CheckpointError, match=r"audit\.json is damaged.*evaluate --audit"):
        read_inputs([tmp_path])
    content = json.loads((tmp_path / "report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps({**content, "schema_version": 1}))
    with pytest.raises(CheckpointError, match="version 1"):
        read_inputs([tmp_path])


def test_a_study_without_one_of_its_reports_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"incomplete.*seen"):
        read_inputs([make_study(tmp_path)])


def test_a_damaged_study_and_one_of_an_unknown_table_are_refused(tmp_path: Path) -> None:
    make_study(tmp_path, paper="table77")
    with pytest.raises(UsageError, match="table77"):
        read_inputs([tmp_path])
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"study\.json is damaged.*run the study again"):
        read_inputs([tmp_path])


def test_reports_of_different_images_cannot_be_compared(tmp_path: Path) -> None:
    study = make_study(tmp_path, reports=["seen", "other"])
    make_report(study / "seen")
    make_report(study / "other", split=coded_split(20))
    with pytest.raises(UsageError, match=r"40 of coded, 20 of coded"):
        read_inputs([study])


def test_one_name_for_two_models_is_refused(tmp_path: Path) -> None:
    study = make_study(tmp_path, reports=["seen", "other"])
    make_report(study / "seen")
    make_report(study / "other")
    file = study / "other" / "report.json"
    file.write_text(file.read_text().replace("b-weights", "b-trained-again"))
    with pytest.raises(UsageError, match=r"model 'b'.*other.*seen.*run the study again"):
        read_inputs([study])


def test_a_row_without_a_report_is_refused(tmp_path: Path) -> None:
    study = make_study(tmp_path, rows={"c": {"label": "DWQ", "paper": "DWQ"}})
    make_report(study / "seen")
    with pytest.raises(CheckpointError, match="row 'c'"):
        read_inputs([study])
