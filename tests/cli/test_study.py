from __future__ import annotations

import json
from pathlib import Path

import pytest

from qadtr_brevitas.cli.main import main
from tests.reproduce.study.support import write_study_file

SCALE = ["--scale", "smoke", "--device", "cpu"]


@pytest.mark.slow
def test_a_study_runs_from_start_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_study_file(tmp_path)
    command = ["study", str(file), "-o", str(tmp_path / "out"), *SCALE]
    assert main([*command, "--dry-run", "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)
    assert [step["part"] for step in steps if step["part"].startswith("train")] == ["train plain", "train fixed-4"]
    assert not any(step["there"] for step in steps)
    assert not (tmp_path / "work").exists()

    assert main([*command, "--all"]) == 0
    found = capsys.readouterr()
    assert "test images, and still on" in found.out
    assert "Plain" in found.out
    assert "clean accuracy" in found.out
    assert "study.json, study.yaml, study.md, figures.csv, report.html" in found.err
    facts = json.loads((tmp_path / "out" / "study.json").read_text())
    assert facts["command"].startswith("qadtr-brevitas study")
    assert "Plain" in (tmp_path / "out" / "report.html").read_text()

    assert main([*command, "--dry-run"]) == 0
    assert "0 of 7 steps" in capsys.readouterr().err


def test_an_estimate_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["study", str(write_study_file(tmp_path)), "-o", str(tmp_path / "out"), *SCALE, "--estimate", "--json"]
    assert main([*command, "--speedup", "10", "--price", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["kind"] for row in found["rows"]} == {"train", "make patches", "evaluate"}
    assert found["dollars"] == pytest.approx(3 * found["hours"])
    assert found["hours"] == pytest.approx(sum(row["hours"] for row in found["rows"]))
    assert not (tmp_path / "work").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table99"], "'table99'"),
        (["table11", "--scale", "tiny"], "'tiny'"),
        (["table11", "models.qadtr.recipe=nowhere"], "'nowhere'"),
        (["table11", "model.qadtr.recipe=nowhere"], "did you mean 'models'?"),
        (["table11", "-o", "s3://bucket/study"], "/mnt/s3"),
        (["table11", "--work", "gs://bucket/work"], "gcsfuse"),
        (["table20", "analyses.spatial.models=[qatt]"], "'qatt' in this study: did you mean 'qat'"),
    ],
)
def test_bad_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_finished_model_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_study_file(tmp_path)
    assert main(["study", str(file), "models={plain: {path: gone}}", "-o", str(tmp_path / "out"), *SCALE]) == 1
    assert "no model in gone" in capsys.readouterr().err
