"""What `study --ray` shows of a cluster."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from qadtr_brevitas.cli.main import main
from qadtr_brevitas.cli.study_cluster import cluster_table
from qadtr_brevitas.reproduce.study.cluster import RunningStep


def test_the_table_names_node_time_and_progress_of_what_runs() -> None:
    running = RunningStep("train plain", "node-7", 75.0, 30, 200, "loss 0.51")
    text = StringIO()
    Console(file=text, width=100).print(cluster_table([running, RunningStep("train fixed")], 3, 9))
    shown = text.getvalue()
    assert all(part in shown for part in ("train plain", "node-7", "75 s", "30/200 loss 0.51"))
    assert "3 of 9 steps finished, 1 running, 1 waiting for room" in shown
    assert "train fixed" not in shown


@pytest.mark.parametrize("other", [["--jobs", "2"], ["--shard", "1/2"]])
def test_the_steps_are_divided_in_one_way(other: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "table11", *other, "--ray"]) == 2
    assert "--shard, --jobs and --ray" in capsys.readouterr().err
