"""`study --jobs` and `study --ray`: run steps in several processes or on a cluster, and show what runs where."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qadtr_brevitas.cli.common import command_line, is_quiet, say, stderr
from qadtr_brevitas.core.progress import format_seconds

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qadtr_brevitas.reproduce.study.plan import StudyPlan
    from qadtr_brevitas.reproduce.study.resources import StudyResources
    from qadtr_brevitas.reproduce.study.schedule import RunningStep, Show


def run_in_jobs(plan: StudyPlan, resources: StudyResources, *, jobs: int) -> None:
    """Run the steps in several processes of this machine."""
    from qadtr_brevitas.reproduce.study.jobs import run_in_processes

    with _live_table() as show:
        run_in_processes(plan, resources, jobs=jobs, report=say, show=show)


def run_on_cluster(plan: StudyPlan, work: Path, *, address: str, device: str, processes: int, compiles: bool) -> None:
    """Run the steps on the cluster at an address; the folders are absolute."""
    import torch

    from qadtr_brevitas.reproduce.study.cluster import run_on_ray
    from qadtr_brevitas.reproduce.study.resources import StudyResources

    # The cores of this machine say nothing about those of others.
    threads = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else 1
    resources = StudyResources(work, device, processes, command_line(), compiles)
    with _live_table() as show:
        run_on_ray(plan, resources, address=address, threads=threads, report=say, show=show)


def workers_table(steps: Sequence[RunningStep], finished: int, total: int) -> RenderableType:
    """Return a table of the steps that were handed over, and a line about the study."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table("step", "node", "time", "progress", box=None)
    for step in steps:
        if step.host:
            parts = f"{step.done}/{step.total}" if step.total else ""
            table.add_row(step.name, step.host, format_seconds(step.seconds), f"{parts} {step.note}".strip())
    waiting = len(steps) - table.row_count
    line = f"{finished} of {total} steps finished, {table.row_count} running, {waiting} waiting for room"
    return Group(table, Text(line))


@contextmanager
def _live_table() -> Generator[Show]:
    """Show the table on a terminal, in one place; off it and under -q nothing is shown."""
    from rich.live import Live

    console = stderr()
    if is_quiet() or not console.is_terminal:
        yield lambda steps, finished, total: None
        return
    with Live(console=console, transient=True) as live:
        yield lambda steps, finished, total: live.update(workers_table(steps, finished, total))
