"""Evaluations that several processes or machines share."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from socket import socket
from subprocess import PIPE, Popen

import pytest

from tests.cli.evaluation import NOISE, evaluate

pytestmark = pytest.mark.slow


def without_what_differs(folder: Path) -> dict[str, object]:
    content = json.loads((folder / "report.json").read_text())
    return {key: value for key, value in content.items() if key not in ("created", "command")}


def test_shards_say_what_is_missing_and_merge(runs: list[Path], tmp_path: Path) -> None:
    common = [
        runs[0],
        "--images",
        "12",
        "-b",
        "6",
        "--attack",
        NOISE,
    ]
    whole = evaluate(*common, "-o", tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    first = evaluate(*common, "-o", tmp_path / "one", "--shard", "1/2", "--json")
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout) == {"shard": "1/2", "cells": 8, "missing": {"2/2": 8}}
    assert "missing here: 8 of shard 2/2; next: the same command with --shard 2/2" in first.stderr
    assert not (tmp_path / "one" / "report.json").exists()
    second = evaluate(*common, "-o", tmp_path / "two", "--shard", "2/2", "--cells", tmp_path / "one")
    assert second.exit_code == 0, second.output
    assert "nothing is missing; next: the same command without --shard" in second.stderr
    merged = evaluate(*common, "-o", tmp_path / "one", "--cells", tmp_path / "two")
    assert merged.exit_code == 0, merged.output
    assert without_what_differs(tmp_path / "one") == without_what_differs(tmp_path / "whole")
    assert len(list((tmp_path / "one" / "cells").iterdir())) == 8


def test_processes_share_the_work_and_the_first_one_reports(runs: list[Path], tmp_path: Path) -> None:
    common = [
        str(runs[0]),
        "--images",
        "6",
        "--attack",
        NOISE,
        "--device",
        "cpu",
    ]
    common += ["--threads", "1", "--transfer", "none"]
    assert evaluate(*common, "-o", tmp_path / "alone").exit_code == 0
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        Popen(
            [sys.executable, "-m", "qadtr_brevitas", "evaluate", *common, "-o", str(tmp_path / "both")],
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            stdout=PIPE,
            stderr=PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    (first, talk), (second, _) = (process.communicate(timeout=280) for process in processes)
    assert [process.returncode for process in processes] == [0, 0], talk
    assert "highest ASR" in first
    assert second == ""
    assert without_what_differs(tmp_path / "both") == without_what_differs(tmp_path / "alone")


def test_shard_and_torchrun_do_not_mix(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = evaluate(runs[0], "--shard", "1/2", "-o", tmp_path)
    assert (result.exit_code, "remove --shard" in result.stderr) == (2, True)
