"""Progress of a command that goes through phases of different kinds, such as an export: never silent for long."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager

from qadtr_brevitas.cli.common import is_quiet, stderr
from qadtr_brevitas.core.progress import Progress

_SECONDS = 5.0


@contextmanager
def phases(description: str) -> Generator[Progress]:
    """Return a progress that shows which phase is running and for how long.

    On a terminal it is a line that keeps its clock going; elsewhere a line every five seconds.

    Args:
        description: comes first in every line.
    """
    if is_quiet():
        yield lambda done, total, note="": None
    elif stderr().is_terminal:
        with _on_terminal(description) as report:
            yield report
    else:
        with _in_log(description) as report:
            yield report


@contextmanager
def _on_terminal(description: str) -> Generator[Progress]:
    from rich.progress import Progress as ProgressBar
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with ProgressBar(*columns, console=stderr(), transient=True) as bar:
        task = bar.add_task(description, total=None)

        def report(done: int, total: int, note: str = "") -> None:
            bar.update(task, description=_line(description, done, total, note))

        yield report


@contextmanager
def _in_log(description: str) -> Generator[Progress]:
    ended, last = threading.Event(), [description]
    started = time.monotonic()

    def report(done: int, total: int, note: str = "") -> None:
        last[0] = _line(description, done, total, note)

    def write() -> None:
        while not ended.wait(_SECONDS):
            stderr().print(f"{last[0]} ({time.monotonic() - started:.0f} s)", markup=False)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        yield report
    finally:
        ended.set()
        thread.join()


def _line(description: str, done: int, total: int, note: str) -> str:
    count = f", {done} of {total}" if total else ""
    return f"{description}: {note}{count}" if note else f"{description}{count}"
