from __future__ import annotations

from pathlib import Path

import pytest

from qadtr_brevitas.reproduce.page import read_inputs
from qadtr_brevitas.reproduce.page.parts import ReportInput
from qadtr_brevitas.reproduce.page.warnings import audit_warnings
from tests.reproduce.page.support import make_audit, make_report


@pytest.fixture
def parts(tmp_path: Path) -> list[ReportInput]:
    make_report(tmp_path / "one")
    make_report(tmp_path / "two", names=("c",))
    make_audit(tmp_path / "one", model="b", fingerprint="b-weights")
    return [part for part in read_inputs([tmp_path / "one", tmp_path / "two"]) if isinstance(part, ReportInput)]


def test_each_warning_names_model_precision_and_check(parts: list[ReportInput]) -> None:
    assert audit_warnings(parts, ["b"]) == ("b at 4 bit: G5 Black box: a black box breaks more: gradients are masked.",)


def test_models_that_were_not_checked_are_named(parts: list[ReportInput]) -> None:
    (found,) = audit_warnings(parts, ["a", "c"])
    assert found.startswith("No audit was run on a, c: a low ASR may be an attack that failed")
    assert len(audit_warnings(parts, ["a", "b"])) == 2


def test_one_audit_serves_all_names_of_the_same_weights(tmp_path: Path, parts: list[ReportInput]) -> None:
    file = tmp_path / "two" / "report.json"
    file.write_text(file.read_text().replace("c-weights", "b-weights"))
    again = [part for part in read_inputs([tmp_path / "one", tmp_path / "two"]) if isinstance(part, ReportInput)]
    (found,) = audit_warnings(again, ["b", "c"])
    assert found.startswith("b at 4 bit")
