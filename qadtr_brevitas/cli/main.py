"""The group of all commands, none of which is imported before it is called, and the one place that words errors."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType

import click

from qadtr_brevitas.cli import common
from qadtr_brevitas.core.device import keep_freed_memory
from qadtr_brevitas.core.errors import QadtrError, UsageError
from qadtr_brevitas.core.version import __version__

COMMANDS = {
    "convert": ("qadtr_brevitas.cli.convert", "Turn a float model into a switchable quantized one."),
    "train": ("qadtr_brevitas.cli.train", "Train a switchable quantized model as a recipe says."),
    "attack": ("qadtr_brevitas.cli.attack", "Make adversarial patches against a model."),
    "evaluate": ("qadtr_brevitas.cli.evaluate", "Score models under attack and write a report."),
    "analyze": ("qadtr_brevitas.cli.analyze", "Look into why attacks move between precisions."),
    "report": ("qadtr_brevitas.cli.report", "Show results as one HTML page, beside the paper's."),
    "board": ("qadtr_brevitas.cli.board", "Rank models of many reports, checked by the same rules."),
    "study": ("qadtr_brevitas.cli.study", "Carry out a whole comparison: train, attack, evaluate, report."),
    "view": ("qadtr_brevitas.cli.view", "Look at a model in the browser, under a patch that one drags."),
    "export": ("qadtr_brevitas.cli.export", "Write a model for FPGA and edge tools, proved equal."),
    "push": ("qadtr_brevitas.cli.push", "Upload a model to the Hugging Face Hub, with a model card."),
    "recipes": ("qadtr_brevitas.cli.recipes", "List, show, copy and check recipes."),
    "list": ("qadtr_brevitas.cli.list", "List models, attacks, data sets and other names."),
    "info": ("qadtr_brevitas.cli.info", "Say what a model, run, patch or report is."),
}

_INTERRUPTED = (
    "Interrupted. Repeat the command: `train`, `attack`, `evaluate` and `study` resume where they stopped, others "
    "start over and leave nothing half-written."
)


class LazyGroup(click.Group):
    """A group that knows its commands by name and help, and imports one only to run it or to show its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order in which the commands are used."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command."""
        if cmd_name not in COMMANDS:
            return None
        return import_module(COMMANDS[cmd_name][0]).command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; an unknown one is answered with the nearest name, which click looks up elsewhere."""
        try:
            return super().resolve_command(ctx, args)
        except click.NoSuchCommand as error:
            raise click.NoSuchCommand(error.command_name, possibilities=COMMANDS, ctx=ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from the table, not from the commands."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; an error meant for users becomes one that click prints without a traceback."""
        try:
            return super().invoke(ctx)
        except (QadtrError, OSError) as error:
            # A closed pipe, as in `... | head`, is click's to handle.
            if isinstance(error, BrokenPipeError):
                raise
            if common.wants_debug():
                traceback.print_exc()
            failure = _WrongUsage if isinstance(error, UsageError) else _Failure
            raise failure(_word(error)) from error


class _Failure(click.ClickException):
    """An error as it is shown: red, on stderr; exit code 1."""

    def show(self, file: object = None) -> None:
        space = "\n" if "\n" in self.message else " "
        common.stderr().print(f"Error:{space}{self.message}", style="red", markup=False)


class _WrongUsage(_Failure):
    """One that the user can cure by typing something else."""

    exit_code = UsageError.exit_code


def _word(error: QadtrError | OSError) -> str:
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or error}; check the path, its permissions and the free space"
    return str(error)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    epilog=common.examples(
        "qadtr-brevitas recipes list",
        "qadtr-brevitas train digits_qadtr -o runs/qadtr",
        "qadtr-brevitas attack runs/qadtr -o runs/qadtr/patches",
        "qadtr-brevitas evaluate runs/qadtr -o runs/report",
    ),
)
@click.version_option(__version__, prog_name="qadtr-brevitas")
@common.debug_option
def cli() -> None:
    """Train, attack and deploy quantized networks that resist adversarial patches (QADT-R on Brevitas).

    Every command says which files it wrote, and most what to type next.
    """


class _Talk(logging.Handler):
    """Says what the package logs, such as that it fills a cache; one process of torchrun does."""

    def emit(self, record: logging.LogRecord) -> None:
        """Say the message."""
        if os.environ.get("RANK", "0") == "0":
            common.say(record.getMessage())


def _stop_on_sigterm() -> list[int]:
    """Have SIGTERM stop a command as Ctrl-C does, so that it cleans up; return the list that it is then recorded in."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    # Others keep what a program that embeds this one has set, and threads may set nothing.
    if current_thread() is main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, stop)
    return received


def _tell(words: Callable[[], None]) -> None:
    """Tell why the command ends; of the processes that torchrun started together, the first that comes here does.

    Not that of rank 0, which may have been killed. The first knows the cause, and the others end because it is gone.
    Processes on other machines have a console of their own, where one of them tells. Without torchrun all do.
    """
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    # In a folder of this process, which lies in one of this start that torchrun makes anew and deletes.
    start = Path(place).parent.parent if place else None
    if start is None or not start.name.startswith("attempt_"):
        words()
        return
    if current_thread() is main_thread():
        # Torchrun sends it to all when one has ended, in the middle of what is told.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if _comes_first(start):
        words()


def _comes_first(start: Path) -> bool:
    try:
        os.close(os.open(start / "told", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except OSError:
        # Several messages are better than none.
        return True
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 is ok, 1 failure, 2 bad usage or an invalid recipe; 130 and 143 are Ctrl-C and SIGTERM.
    """
    keep_freed_memory()
    terminated = _stop_on_sigterm()
    # Brevitas looks for a compiler, and PyTorch says that there is no GPU for it.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    logger = logging.getLogger("qadtr_brevitas")
    if not any(isinstance(handler, _Talk) for handler in logger.handlers):
        logger.addHandler(_Talk())
        logger.setLevel(logging.INFO)
    for stream in (sys.stdout, sys.stderr):
        # A name that a terminal cannot show must not cost the results that stand beside it.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        result = cli.main(arguments, prog_name="qadtr-brevitas", standalone_mode=False)
    except click.ClickException as error:
        _tell(error.show)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _tell(partial(click.echo, _INTERRUPTED, err=True))
        return 128 + (signal.SIGTERM if terminated else signal.SIGINT)
    except BrokenPipeError:
        # Python would complain once more when it flushes at exit.
        sys.stdout = None
        return 1
    return result if isinstance(result, int) else 0
