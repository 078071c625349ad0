from __future__ import annotations

import json
from pathlib import Path

import pytest

from qadtr_brevitas.cli.main import main
from tests.reproduce.study.support import write_study

SCALE = ["--scale", "smoke", "--device", "cpu"]


def test_a_study_from_beginning_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_study(tmp_path)
    command = ["study", str(file), "-o", str(tmp_path / "out"), *SCALE]
    assert main([*command, "--dry-run", "--json"]) == 0
    parts = json.loads(capsys.readouterr().out)
    assert [part["part"] for part in parts if part["part"].startswith("train")] == ["train plain", "train fixed-4"]
    assert not any(part["there"] for part in parts)
    assert not (tmp_path / "work").exists()

    assert main([*command, "--shard", "2/2"]) == 0
    found = capsys.readouterr()
    assert "Plain" in found.out
    assert "clean accuracy" in found.out
    assert "wrote study.json, study.yaml, study.md, figures.csv, report.html" in found.err
    facts = json.loads((tmp_path / "out" / "study.json").read_text())
    assert facts["command"].startswith("qadtr-brevitas study")
    assert "Plain" in (tmp_path / "out" / "report.html").read_text()

    assert main([*command, "--dry-run"]) == 0
    assert "0 of 7 parts are to be made" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table99"], "there is no study 'table99'"),
        (["table11", "--scale", "tiny"], "has no scale 'tiny'"),
        (["table11", "models.qadtr.recipe=nowhere"], "there is no recipe 'nowhere'"),
        (["table11", "model.qadtr.recipe=nowhere"], "unknown key 'model': did you mean 'models'?"),
        (["table11", "--scale", "smoke", "--shard", "3/2"], "--shard '3/2' cannot be read"),
        (["table20", "analyses.spatial.models=[qatt]"], "there is no 'qatt' in this study: did you mean 'qat'"),
    ],
)
def test_bad_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_finished_model_that_is_not_there_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_study(tmp_path)
    assert main(["study", str(file), "models={plain: {path: gone}}", "-o", str(tmp_path / "out"), *SCALE]) == 1
    assert "there is no finished model in gone" in capsys.readouterr().err
