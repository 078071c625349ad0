"""What `study --jobs` and `study --ray` show of what runs where."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from qadtr_brevitas.cli.main import main
from qadtr_brevitas.cli.study_workers import workers_table
from qadtr_brevitas.reproduce.study.schedule import RunningStep


def test_the_table_names_node_time_and_progress_of_what_runs() -> None:
    running = RunningStep("train plain", "node-7", 75.0, 30, 200, "loss 0.51")
    text = StringIO()
    Console(file=text, width=100).print(workers_table([running, RunningStep("train fixed")], 3, 9))
    shown = text.getvalue()
    assert all(part in shown for part in ("train plain", "node-7", "75 s", "30/200 loss 0.51"))
    assert "3 of 9 steps finished, 1 running, 1 waiting for room" in shown
    assert "train fixed" not in shown


def test_the_steps_are_divided_in_one_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "table11", "--jobs", "2", "--ray"]) == 2
    assert "--jobs and --ray" in capsys.readouterr().err
