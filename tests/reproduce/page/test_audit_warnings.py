from __future__ import annotations

from pathlib import Path

import pytest

from qadtr_brevitas.reproduce.page import read_inputs
from qadtr_brevitas.reproduce.page.audit_warnings import audit_warnings
from qadtr_brevitas.reproduce.page.inputs import ReportInput
from tests.reproduce.page.support import make_audit, make_report


@pytest.fixture
def reports(tmp_path: Path) -> list[ReportInput]:
    make_report(tmp_path / "one")
    make_report(tmp_path / "two", names=("c",))
    make_audit(tmp_path / "one", model="b", fingerprint="b-weights")
    return [found for found in read_inputs([tmp_path / "one", tmp_path / "two"]) if isinstance(found, ReportInput)]


def test_each_warning_names_model_precision_and_check(reports: list[ReportInput]) -> None:
    assert audit_warnings(reports, ["b"]) == (
        "b at 4 bit: G5 Black box: a black box breaks more: gradients are masked.",
    )


def test_models_without_an_audit_are_named(reports: list[ReportInput]) -> None:
    (found,) = audit_warnings(reports, ["a", "c"])
    assert "No audit was run on a, c" in found
    assert len(audit_warnings(reports, ["a", "b"])) == 2


def test_one_audit_serves_all_names_of_the_same_weights(tmp_path: Path, reports: list[ReportInput]) -> None:
    file = tmp_path / "two" / "report.json"
    file.write_text(file.read_text().replace("c-weights", "b-weights"))
    again = [found for found in read_inputs([tmp_path / "one", tmp_path / "two"]) if isinstance(found, ReportInput)]
    (found,) = audit_warnings(again, ["b", "c"])
    assert found.startswith("b at 4 bit")
