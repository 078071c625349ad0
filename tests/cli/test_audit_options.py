from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qadtr_brevitas.auditing.checks import CHECKS
from qadtr_brevitas.cli.main import cli
from tests.evaluation.models import make_model_dir


@pytest.fixture(autouse=True)
def few_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [check for check in CHECKS if check.id in {"G9", "G11", "G17"}]
    monkeypatch.setattr("qadtr_brevitas.auditing.run.CHECKS", kept)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [make_model_dir(folder / name, name=seed) for seed, name in enumerate(("first", "second"))]


def evaluate(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["evaluate", *map(str, arguments)])


@pytest.mark.slow
def test_an_audit_needs_no_patches_and_joins_the_report(runs: list[Path], tmp_path: Path) -> None:
    result = evaluate(runs[0], "--audit", "--precision", "32,4", "-o", tmp_path, "--all")
    assert result.exit_code == 0, result.output
    assert "wrote report.json, report.md, cells.csv, worst_case.csv, audit.json" in result.stderr
    report = (tmp_path / "report.md").read_text()
    for words in ("Audit: is a low ASR robustness", "Audit of first at 32 bit", "Audit of first at 4 bit", "G17"):
        assert words in result.stdout
        assert words in report
    assert "give --twin DIR" in report
    (audit,) = json.loads((tmp_path / "audit.json").read_text())
    assert (audit["model"], [part["precision"] for part in audit["precisions"]]) == ("first", ["32", "4"])
    assert len(list((tmp_path / "audit").iterdir())) == 2


@pytest.mark.slow
def test_json_holds_the_audit(runs: list[Path], tmp_path: Path) -> None:
    result = evaluate(*runs, "--audit", "--audit-images", 20, "--precision", "4", "-o", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    audits = json.loads(result.stdout)["audit"]
    assert audits == json.loads((tmp_path / "audit.json").read_text())
    assert [(audit["model"], audit["images"], audit["profile"]) for audit in audits] == [
        ("first", 20, "quick"),
        ("second", 20, "quick"),
    ]


def test_a_twin_is_for_the_audit(runs: list[Path], tmp_path: Path) -> None:
    result = evaluate(runs[0], "--twin", runs[1], "-o", tmp_path)
    assert result.exit_code == 2
    assert "--twin needs --audit" in result.stderr
    result = evaluate(runs[0], "--ablation", runs[1], "-o", tmp_path)
    assert "--ablation needs --audit" in result.stderr
    result = evaluate(runs[0], "--audit-images", 200, "-o", tmp_path)
    assert (result.exit_code, "--audit-images needs --audit" in result.stderr) == (2, True)


@pytest.mark.slow
def test_a_twin_is_attacked(runs: list[Path], tmp_path: Path) -> None:
    result = evaluate(runs[0], "--audit", "--precision", "4", "--twin", runs[1], "-o", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    (part,) = json.loads(result.stdout)["audit"][0]["precisions"]
    twin = next(finding for finding in part["findings"] if finding["id"] == "G17")
    assert "--twin" not in twin["meaning"]
