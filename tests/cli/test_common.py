"""Options and output that all commands share."""

from __future__ import annotations

import json
import os
import sys

import click
import pytest
import torch
from click.testing import CliRunner
from rich.table import Table

from qadtr_brevitas.cli import common


@click.command(epilog=common.examples("toy --json"))
@common.device_option
@common.seed_option()
@common.threads_option
@common.output_options
def toy(device: str, seed: int) -> None:
    """Do nothing."""
    table = Table("seed")
    table.add_row(str(seed))
    with common.progress("working") as report:
        report(1, 2, "half")
        report(2, 2)
    common.emit({"seed": seed, "device": device, "name": "Größe"}, table)
    common.say("wrote nothing; next: [toy]")


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(toy, arguments)


def test_data_and_talk_go_apart(run) -> None:
    result = run("--seed", "7")
    assert result.exit_code == 0
    assert "7" in result.stdout
    assert result.stderr == "wrote nothing; next: [toy]\n"


def test_json_is_one_document(run) -> None:
    result = run("--json")
    assert json.loads(result.stdout) == {"seed": 0, "device": "auto", "name": "Größe"}
    assert "Größe" in result.stdout
    assert result.stderr == "wrote nothing; next: [toy]\n"


@pytest.mark.parametrize("flag", ["-q", "--quiet"])
def test_quiet_keeps_results_only(run, flag: str) -> None:
    result = run(flag)
    assert "seed" in result.stdout
    assert result.stderr == ""


def test_output_off_a_terminal_has_no_control_codes(run) -> None:
    result = run()
    assert "\x1b" not in result.output
    assert "\r" not in result.output


def test_a_terminal_gets_a_bar_unless_it_is_told_not_to(monkeypatch: pytest.MonkeyPatch, run) -> None:
    from rich.console import Console

    monkeypatch.setattr(common, "stderr", lambda: Console(file=sys.stderr, force_terminal=True, width=80))
    assert "working" in run().stderr
    assert "working" not in run("-q").stderr


def test_examples_are_shown_as_written(run) -> None:
    assert "Examples:\n    toy --json\n" in run("--help").stdout


@pytest.mark.parametrize("arguments", [["--seed", "-1"], ["--seed", "x"], ["--threads", "0"]])
def test_values_out_of_range(run, arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_threads_are_set_before_and_after_torch_is_there(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    try:
        run("--threads", "2")
        assert os.environ["OMP_NUM_THREADS"] == "2"
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_outside_a_command_nothing_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert not common.is_quiet()
    assert not common.wants_json()
    common.emit({}, "text")
    common.emit({}, None)
    assert capsys.readouterr().out == "text\n"
