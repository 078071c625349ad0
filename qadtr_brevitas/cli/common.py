"""What all commands share: options, results on stdout, messages and progress on stderr.

@click.command("evaluate", epilog=examples("qadtr-brevitas evaluate runs/qat"))
@device_option
@seed_option()
@output_options
def command(device: str, seed: int) -> None:
    with progress("attacking") as report:
        ...                         # report(done, total), or report(done, total, "loss 1.2")
    emit(data, table)               # the table, or `data` as JSON with --json
    say("wrote report.json; next: qadtr-brevitas ...")

`RecordedCommand` keeps its command line for reports, so that they can be made again.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.progress import Progress

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem
    from rich.console import Console, RenderableType

    from qadtr_brevitas.data.base import Dataset
    from qadtr_brevitas.data.split import Split

_Command = TypeVar("_Command", bound=Callable[..., Any])

# Columns of a terminal with room for a long bar; the shortest text worth showing; and the time left with the spaces
# between all parts of a bar.
_WIDE, _SHORTEST, _TIME_AND_SPACES = 100, 8, 12

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://", flags=re.IGNORECASE)
QUIET, JSON, DEBUG = (f"qadtr_brevitas.{name}" for name in ("quiet", "json", "debug"))


def examples(*lines: str) -> str:
    """Return the `Examples:` block at the end of a command's help."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def output_options(command: _Command) -> _Command:
    """Add --json, -q/--quiet and --debug; `emit`, `say`, `progress` and the error handler obey them."""
    command = debug_option(command)
    command = _flag("--quiet", "-q", key=QUIET, help="Print results, warnings and errors only.")(command)
    return _flag("--json", "json_", key=JSON, help="Print one JSON document on standard output.")(command)


def debug_option(command: _Command) -> _Command:
    """Add --debug; `output_options` has it already."""
    return _flag("--debug", key=DEBUG, help="Show the traceback of an error.")(command)


def device_option(command: _Command) -> _Command:
    """Add --device; hand its value to `resolve_device`."""
    return click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]|mps", help="Device.")(
        command
    )


def seed_option(default: int | None = 0) -> Callable[[_Command], _Command]:
    """Add --seed; with default None the command sees None where it is not given."""
    return click.option(
        "--seed", type=click.IntRange(min=0), default=default, show_default=default is not None, help="Random seed."
    )


def threads_option(command: _Command) -> _Command:
    """Add --threads, which is obeyed at once: numeric libraries read it when they are first imported."""
    return click.option(
        "--threads", type=click.IntRange(min=1), expose_value=False, callback=_set_threads, help="CPU threads to use."
    )(command)


def option_block(*options: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    """Several options as one decorator, in the order in which help lists them."""

    def add(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def was_given(parameter: str) -> bool:
    """Whether an option of the running command stands on the command line, even with its default's value."""
    return click.get_current_context().get_parameter_source(parameter) is ParameterSource.COMMANDLINE


def check_needed(*parameters: str, needs: str, is_there: bool) -> None:
    """Refuse options that are on the command line where what uses them is not.

    Args:
        parameters: names of their parameters.
        needs: the option that uses them, with a value if it takes one, as `--certify 8`.
        is_there: whether something uses them.

    Raises:
        UsageError: one of them is on the command line, and nothing uses it.
    """
    given = [parameter for parameter in parameters if was_given(parameter)]
    if is_there or not given:
        return
    command = click.get_current_context().command
    option = next(found.opts[0] for found in command.params if found.name == given[0])
    name, _, value = needs.partition(" ")
    example = f", for instance {needs}" if value else ""
    raise UsageError(f"{option} needs {name}: add it{example}, or remove {option}")


compile_option = click.option(
    "--compile",
    "compiles",
    is_flag=True,
    help="Run the passes of attacks and of masked images through torch.compile: a wait at the first one, of 32 bit and "
    "of all other precisions together, then faster ones. Results differ by float rounding.",
)
"""--compile, of commands that attack."""


class LocalPath(click.Path):
    """Where results go: a path of a file system, which a URL is not."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if (scheme := _URL.match(str(value))) is not None:
            self.fail(
                f"{value} is a URL, and results are files that are renamed and locked: mount the storage on every "
                f"machine (s3: mount-s3, gs: gcsfuse, others: rclone mount) and give that folder, as /mnt/{scheme[1]}",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


def work_options(*, data: str, output: str) -> Callable[[_Command], _Command]:
    """Add what `attack` and `evaluate` have in common: data, output, device, seed, threads and the output options.

    Args:
        data: the default of --data, in words.
        output: the default of --output, in words.
    """
    return option_block(
        click.option("--data", help=f"Data set as NAME[:ROOT].  [default: {data}]", shell_complete=_complete_datasets),
        click.option("--output", "-o", type=LocalPath(), help=f"Folder.  [default: {output}]"),
        device_option,
        seed_option(),
        threads_option,
        output_options,
    )


def _complete_datasets(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from qadtr_brevitas.cli.completion import complete_plugins
    from qadtr_brevitas.core.registry import DATASETS

    return complete_plugins(DATASETS)(context, parameter, incomplete)


def stdout() -> Console:
    """Where results go; plain text off a terminal and under NO_COLOR."""
    from rich.console import Console

    # A pipe has no width: wide enough that no table is cut.
    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 200)


def stderr() -> Console:
    """Where talk, progress and errors go; plain text off a terminal and under NO_COLOR."""
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False, soft_wrap=True)


def is_quiet() -> bool:
    """Return True under -q/--quiet."""
    return bool(_meta().get(QUIET))


def wants_json() -> bool:
    """Return True under --json."""
    return bool(_meta().get(JSON))


def wants_debug() -> bool:
    """Return True under --debug."""
    return bool(_meta().get(DEBUG))


def be_quiet() -> None:
    """Acts as if -q had been given."""
    _meta()[QUIET] = True


def say(message: str) -> None:
    """Print a line of talk on stderr, unless -q is given."""
    if not is_quiet():
        stderr().print(message, markup=False)


def warn(message: str) -> None:
    """Print on stderr what makes a result worthless if it is overlooked, under -q too."""
    stderr().print(f"WARNING: {message}", style="bold yellow", markup=False)


def command_of(*words: object) -> str:
    """Return a command of this package to type next, in which paths with spaces and signs are quoted."""
    return shlex.join(["qadtr-brevitas", *map(str, words)])


def emit(data: Any, text: RenderableType | None = None) -> None:
    """Print a command's result on stdout: `data` as one JSON document under --json, else `text` for people.

    A `text` of None prints nothing; a plain string is printed as it is.
    """
    if wants_json():
        is_utf8 = "utf" in (getattr(sys.stdout, "encoding", None) or "").lower()
        click.echo(json.dumps(data, indent=2, ensure_ascii=not is_utf8, allow_nan=False))
    elif isinstance(text, str):
        click.echo(text)
    elif text is not None:
        stdout().print(text)


@contextmanager
def progress(description: str) -> Generator[Progress]:
    """Return a progress bar with the time left on stderr; silent off a terminal and under -q."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as ProgressBar

    console = stderr()
    bar_width = 40 if console.width >= _WIDE else 12
    name = _shortened(description, max(_SHORTEST, console.width // 3))
    columns = TextColumn("{task.description}", markup=False), BarColumn(bar_width), MofNCompleteColumn()
    note_column = TextColumn("{task.fields[note]}", markup=False)
    disabled = is_quiet() or not console.is_terminal
    with ProgressBar(*columns, TimeRemainingColumn(), note_column, console=console, disable=disabled) as bar:
        task = bar.add_task(name, total=None, note="")

        def report(done: int, total: int, note: str = "") -> None:
            # The count and the time left stay visible; what does not fit beside them is cut off.
            count = 2 * len(str(total)) + 1
            room = console.width - len(name) - bar_width - count - _TIME_AND_SPACES
            bar.update(task, completed=done, total=total or None, note=_shortened(note, room))

        yield report


def _shortened(text: str, room: int) -> str:
    """Return a text cut off at so many characters; nothing where there is no room for a word."""
    if len(text) <= room:
        return text
    return f"{text[: room - 1]}…" if room >= _SHORTEST else ""


def load_split(dataset: Dataset, split: str, *, limit: int | None = None, seed: int = 0) -> Split:
    """Load one split of a data set, or so many of its images, with a progress bar."""
    from qadtr_brevitas.config.slots import slot_name

    with progress(f"reading {slot_name(dataset)} {split} images") as report:
        return dataset.load(split, limit=limit, seed=seed, progress=report)


def _flag(*names: str, key: str, help: str) -> Callable[[_Command], _Command]:
    """Return a flag kept beside the command's own parameters, for the functions above."""

    def store(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            context.meta[key] = True

    return click.option(*names, is_flag=True, expose_value=False, callback=store, help=help)


def _meta() -> dict[str, Any]:
    context = click.get_current_context(silent=True)
    return context.meta if context else {}


def _set_threads(context: click.Context, parameter: click.Parameter, value: int | None) -> None:
    if value is None:
        return
    os.environ["OMP_NUM_THREADS"] = str(value)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(value)


_KEY = "qadtr_brevitas.command_line"


class RecordedCommand(click.Command):
    """Keeps its arguments as they were typed; `command_line` gives them back."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the arguments and parse them as always."""
        ctx.meta[_KEY] = shlex.join(["qadtr-brevitas", ctx.info_name or "", *args])
        return super().parse_args(ctx, args)


def command_line() -> str:
    """Return the command that is running, as it can be typed in a shell."""
    return str(click.get_current_context().meta[_KEY])
