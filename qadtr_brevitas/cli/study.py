"""`qadtr-brevitas study STUDY [key=value ...]`."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qadtr_brevitas.cli.common import (
    LocalPath,
    RecordedCommand,
    command_line,
    command_of,
    compile_option,
    device_option,
    emit,
    examples,
    output_options,
    progress,
    say,
    threads_option,
)
from qadtr_brevitas.cli.completion import complete_studies
from qadtr_brevitas.cli.start import load_libraries
from qadtr_brevitas.cli.study_cost import tell_cost
from qadtr_brevitas.cli.study_workers import run_in_jobs, run_on_cluster
from qadtr_brevitas.config import shipped
from qadtr_brevitas.core.errors import UsageError, suggest
from qadtr_brevitas.core.extras import require
from qadtr_brevitas.pipeline.directories import PAGE_FILE, STUDY_FILE, STUDY_TEXT_FILE

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qadtr_brevitas.core.progress import Progress
    from qadtr_brevitas.reproduce.study.plan import StudyPlan
    from qadtr_brevitas.reproduce.study.resources import StudyResources
    from qadtr_brevitas.reproduce.study.run import StartProgress
    from qadtr_brevitas.reproduce.study.sections import Study


@click.command(
    "study",
    cls=RecordedCommand,
    epilog=examples(
        "qadtr-brevitas study table11",
        "qadtr-brevitas study table11 --scale smoke -o studies/try",
        "qadtr-brevitas study table13 budget.images=500 seeds=[0,1] --dry-run",
        "qadtr-brevitas study table11 --scale full --estimate --device cuda --price 2.5",
        "qadtr-brevitas study table11 --jobs 4",
        "qadtr-brevitas study table11 --ray                    # on the cluster of `ray start`",
    ),
)
@click.argument("study", shell_complete=complete_studies)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--scale", default="small", show_default=True, help="Which scale of the study: smoke, small or full.")
@click.option("--output", "-o", type=LocalPath(), help="Its folder.  [default: studies/STUDY-SCALE]")
@click.option(
    "--work",
    type=LocalPath(),
    help="Folder of runs, patches and cells, which studies share.  [default: work, beside the output folder]",
)
@click.option(
    "--processes", type=click.IntRange(min=1), default=1, show_default=True, help="Processes of a training (torchrun)."
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Run so many steps at a time on this machine.",
)
@click.option(
    "--ray",
    metavar="[ADDRESS]",
    is_flag=False,
    flag_value="auto",
    help="Run the steps on a Ray cluster whose nodes see the folders; a step takes --threads CPUs, 1 if not given.",
)
@compile_option
@click.option(
    "--estimate", is_flag=True, help="Only tell what the missing steps cost, from times of a few images on --device."
)
@click.option(
    "--speedup",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="For --estimate: how many times faster the study's device is than --device.",
)
@click.option(
    "--price", type=click.FloatRange(min=0), help="For --estimate: dollars for an hour of the study's device."
)
@click.option("--dry-run", is_flag=True, help="Only list the steps and which of them are finished.")
@click.option("--all", "show_all", is_flag=True, help="Print every table, and not only the result in short.")
@device_option
@threads_option
@output_options
def command(
    study: str,
    overrides: tuple[str, ...],
    scale: str,
    output: Path | None,
    work: Path | None,
    processes: int,
    jobs: int,
    ray: str | None,
    compiles: bool,
    estimate: bool,
    speedup: float,
    price: float | None,
    dry_run: bool,
    show_all: bool,
    device: str,
) -> None:
    """Train, attack, evaluate and analyze everything in STUDY that is missing, and write a report.

    STUDY is a file or one of the shipped studies (`list studies`): table02 to table16, table18 to table21, figure01,
    figure03, figure04 of the paper; cifar10_defenses and gtsrb_defenses compare defenses on one budget. KEY=VALUE
    changes one of its keys, for instance budget.images=500. Finished steps are kept: give the same command to resume an
    interrupted study. Other studies use the same networks and patches.
    """
    if not Path(study).is_file() and study.removesuffix(".yaml") not in shipped.shipped_studies():
        raise UsageError(f"there is no study {study!r}: {suggest(Path(study).stem, shipped.shipped_studies())}")
    load_libraries()

    from qadtr_brevitas.reproduce.study.file import load_study

    if jobs > 1 and ray is not None:
        raise UsageError("--jobs and --ray each divide the steps: give one of them")
    checked = load_study(study, overrides, scale=scale)
    output = output or Path("studies") / f"{Path(study).stem}-{scale}"
    work = work or output.resolve().parent / "work"

    from qadtr_brevitas.core.device import resolve_device
    from qadtr_brevitas.reproduce.study.plan import make_plan
    from qadtr_brevitas.reproduce.study.resources import StudyResources

    plan = make_plan(checked, work=work, output=output)
    if dry_run:
        return _show(plan)
    if estimate:
        return tell_cost(plan, device=device, speedup=speedup, price=price)
    for package in ("jinja2", "matplotlib"):
        require(package, extra="reproduce", purpose="study")

    if ray is not None:
        # Nodes have current folders of their own.
        plan = make_plan(checked, work=work.resolve(), output=output.resolve())
        run_on_cluster(plan, work.resolve(), address=ray, device=device, processes=processes, compiles=compiles)
    else:
        resources = StudyResources(
            work, str(resolve_device(device)), processes, command_line(), compiles=compiles, report=say
        )
        _run_here(plan, resources, jobs=jobs)
    _report(checked, plan, output, scale=scale, show_all=show_all)


def _run_here(plan: StudyPlan, resources: StudyResources, *, jobs: int) -> None:
    """Run the steps on this machine."""
    from qadtr_brevitas.reproduce.study.run import run_study

    if jobs > 1:
        return run_in_jobs(plan, resources, jobs=jobs)
    with _progress_bar() as start_progress:
        run_study(plan, resources, report=say, start_progress=start_progress)


@contextmanager
def _progress_bar() -> Generator[StartProgress]:
    """Show one bar, which belongs to the step that runs."""
    with progress("study") as bar:

        def start(step: str) -> Progress:
            return lambda done, total, note="": bar(done, total, f"{step} {note}".rstrip())

        yield start


def _show(plan: StudyPlan) -> None:
    from rich.table import Table

    from qadtr_brevitas.reproduce.study.times import describe_remaining_time

    rows = [(step.name, step.is_finished(), str(step.folder)) for step in plan.steps]
    table = Table("step", "folder", box=None, pad_edge=False)
    for name, is_finished, folder in rows:
        table.add_row(("kept: " if is_finished else "to do: ") + name, folder)
    emit([{"part": name, "there": is_finished, "folder": folder} for name, is_finished, folder in rows], table)
    missing = sum(not is_finished for _, is_finished, _ in rows)
    left = describe_remaining_time(plan.steps) or "an unknown time, since no step of these kinds is finished"
    say(f"{missing} of {len(rows)} steps are to do" + (f", which takes {left}" if missing else ""))
    say("run the command without --dry-run to do them")


def _report(study: Study, plan: StudyPlan, output: Path, *, scale: str, show_all: bool) -> None:
    from rich.console import Group
    from rich.text import Text

    from qadtr_brevitas.reproduce.page import read_inputs
    from qadtr_brevitas.reproduce.page.build import study_headlines
    from qadtr_brevitas.reproduce.page.inputs import StudyInput
    from qadtr_brevitas.reproduce.study.summary import left_open, summary_tables, write_study

    written = write_study(study, plan, output, scale=scale, command=command_line())
    tables = summary_tables(study, plan, scale=scale)
    shown: list[RenderableType] = []
    for item in read_inputs([output]):
        if isinstance(item, StudyInput):
            for name, first in study_headlines(item).items():
                shown += [Text(f"{item.facts.title}: {name}", style="bold"), first.rich()] if first else []
    shown += [table.rich() for table in tables] if show_all or not shown else []
    emit({"output": str(output), "study": str(output / STUDY_FILE)}, Group(*shown))
    if count := len(left_open(study)):
        say(f"the paper leaves {count} {'thing' if count == 1 else 'things'} open, see {STUDY_TEXT_FILE}")
    say(f"wrote {', '.join(path.name for path in written)} to {output}, and a report for each network to reports/")
    more = command_of("report", output, "OTHER_STUDY", "-o", "report.html")
    say(f"open {output / PAGE_FILE} in a browser; next: {more}")
