"""The group: help without imports, exit codes, errors without tracebacks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import qadtr_brevitas
from qadtr_brevitas.cli import main as main_module
from qadtr_brevitas.cli.main import COMMANDS, cli, main
from qadtr_brevitas.core.errors import CheckpointError, UsageError
from qadtr_brevitas.core.version import __version__

SLOW_IMPORTS = {"torch", "timm", "brevitas", "pydantic", "ruamel", "rich", "numpy", "accelerate", "matplotlib"}


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """Add a command `fail` that raises the given error."""

    def install(error: BaseException) -> None:
        @click.command()
        def command() -> None:
            raise error

        module = type(sys)("failing")
        module.command = command
        monkeypatch.setitem(sys.modules, "failing", module)
        monkeypatch.setitem(COMMANDS, "fail", ("failing", "Fail."))

    return install


def fresh(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in an interpreter of its own."""
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=Path(qadtr_brevitas.__file__).parents[1]
    )


def test_help_names_every_command_and_imports_none() -> None:
    code = "import sys\nfrom qadtr_brevitas.cli.main import main\nmain(['--help'])\nprint('|', *sys.modules)"
    text, _, loaded = fresh("-c", code).stdout.rpartition("|")
    for name, (_, help_text) in COMMANDS.items():
        assert f"  {name} " in text
        assert help_text in text
    modules = {name.split(".")[0] for name in loaded.split()}
    assert not modules & SLOW_IMPORTS
    assert not [
        name
        for name in loaded.split()
        if name.startswith("qadtr_brevitas.cli.") and "main" not in name and "common" not in name
    ]


def test_help_takes_a_quarter_of_a_second() -> None:
    """CPU time of the best of three, so that a busy machine does not matter; the bar is doubled for slow ones."""
    times: list[float] = []
    for _ in range(3):
        before = os.times()
        fresh("-m", "qadtr_brevitas", "--help")
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(times) < 0.5


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help_and_examples_and_imports_nothing_heavy(name: str) -> None:
    code = f"import sys\nfrom qadtr_brevitas.cli.main import main\nmain([{name!r}, '-h'])\nprint('|', *sys.modules)"
    result = fresh("-c", code)
    text, _, loaded = result.stdout.rpartition("|")
    assert "Examples:" in text, result.stderr
    assert f"qadtr-brevitas {name}" in text
    modules = {module.split(".")[0] for module in loaded.split()}
    assert not modules & {"torch", "timm", "brevitas", "accelerate", "matplotlib"}


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_option_is_explained(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.help
    unexplained = [
        parameter.name
        for parameter in command.params
        if isinstance(parameter, click.Option) and not parameter.help and not parameter.hidden
    ]
    assert not unexplained


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"qadtr-brevitas, version {__version__}\n"


def test_no_command_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Commands:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["recipe"], "No such command 'recipe'. Did you mean 'recipes'?"),
        (["recipes", "lst"], "No such command 'lst'. Did you mean 'list'?"),
        (["--versio"], "No such option '--versio'. Did you mean '--version'?"),
        (["list", "attacks", "--jso"], "No such option '--jso'. Did you mean '--json'?"),
        (["info"], "Missing argument 'PATH'"),
    ],
)
def test_bad_usage(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UsageError("no such thing [x]; type another"), 2, "Error: no such thing [x]; type another\n"),
        (CheckpointError("it is damaged"), 1, "Error: it is damaged\n"),
        (UsageError("one\ntwo"), 2, "Error:\none\ntwo\n"),
        (OSError(28, "No space left on device", "a.pt"), 1, "Error: a.pt: No space left on device; check the path"),
        (PermissionError(13, "Permission denied"), 1, "Error: Permission denied; check the path, its permissions"),
    ],
)
@pytest.mark.usefixtures("no_color")
def test_errors_have_no_traceback(failing, error, code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    failing(error)
    assert main(["fail"]) == code
    captured = capsys.readouterr()
    assert captured.err.startswith(words)
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_debug_shows_the_traceback(failing, capsys: pytest.CaptureFixture[str]) -> None:
    failing(UsageError("wrong"))
    assert main(["--debug", "fail"]) == 2
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert text.endswith("Error: wrong\n")


def test_debug_can_be_given_to_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--debug", "/missing"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_ends_with_one_line(failing, capsys: pytest.CaptureFixture[str]) -> None:
    failing(KeyboardInterrupt())
    assert main(["fail"]) == 130
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "`train`" in line
    assert "others start over" in line


def test_sigterm_cleans_up_like_an_interrupt() -> None:
    script = """
import os, pathlib, signal, sys, tempfile, types
import click
from qadtr_brevitas.cli import main
from qadtr_brevitas.core.files import replace_directory

@click.command()
def command():
    folder = pathlib.Path(sys.argv[1])
    replace_directory(folder / "out", lambda new: os.kill(os.getpid(), signal.SIGTERM))

sys.modules["slow"] = types.SimpleNamespace(command=command)
main.COMMANDS["slow"] = ("slow", "")
sys.exit(main.main(["slow"]))
"""
    with tempfile.TemporaryDirectory() as folder:
        found = subprocess.run(
            [sys.executable, "-c", script, folder],
            capture_output=True,
            text=True,
            cwd=Path(main_module.__file__).parents[2],
        )
        assert found.returncode == 143, found.stderr
        assert "Traceback" not in found.stderr
        assert not list(Path(folder).iterdir())


def test_a_mistake_of_ours_is_not_hidden(failing) -> None:
    failing(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["fail"])


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m qadtr_brevitas recipes list | true"
    result = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=Path(main_module.__file__).parents[2]
    )
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr


def test_completion_offers_the_commands() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "from qadtr_brevitas.cli.main import main; main()"],
        env={
            **os.environ,
            "_QADTR_BREVITAS_COMPLETE": "bash_complete",
            "COMP_WORDS": "qadtr-brevitas re",
            "COMP_CWORD": "1",
        },
        capture_output=True,
        text=True,
        cwd=Path(main_module.__file__).parents[2],
    )
    assert "recipes" in result.stdout


@pytest.fixture
def sigterm() -> Iterator[None]:
    """Gives SIGTERM its meaning back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("sigterm")
@pytest.mark.parametrize("error", [CheckpointError("lost"), KeyboardInterrupt()])
def test_one_process_of_each_start_of_torchrun_tells_why_it_ends(
    error: BaseException, failing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(error)

    def told(start: str, rank: int) -> bool:
        folder = tmp_path / start / str(rank)
        folder.mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
        assert main(["fail"]) in (1, 130)
        # Click ends the line of a Ctrl-C.
        return bool(capsys.readouterr().err.strip())

    assert [told("attempt_0", rank) for rank in (2, 1, 0)] == [True, False, False]
    # Torchrun sends it to those that are left, which may be in the middle of a word.
    os.kill(os.getpid(), signal.SIGTERM)
    assert [told("attempt_1", rank) for rank in (0, 1)] == [True, False]
    # Other launchers have no such folder.
    assert [told("elsewhere", rank) for rank in (0, 1)] == [True, True]
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "attempt_0" / "0" / "error.json"))
    assert main(["fail"]) in (1, 130)
    assert capsys.readouterr().err.strip()
