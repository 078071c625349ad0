"""A long command says what it does and for how long, on a terminal and in a log."""

from __future__ import annotations

import time

import pytest

from qadtr_brevitas.cli import phases as module
from qadtr_brevitas.cli.phases import phases


def test_a_log_shows_life(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SECONDS", 0.02)
    with phases("exporting 4") as report:
        report(0, 0, "writing qcdq")
        time.sleep(0.1)
        report(3, 10, "comparing")
        time.sleep(0.1)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("exporting 4: writing qcdq (") for line in lines)
    assert any("comparing, 3 of 10" in line for line in lines)
    time.sleep(0.05)
    assert not capsys.readouterr().err


def test_a_short_command_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with phases("exporting") as report:
        report(1, 2, "fast")
    assert not capsys.readouterr().err
