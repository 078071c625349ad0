"""`qadtr-brevitas study STUDY [key=value ...]`."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qadtr_brevitas.cli.common import (
    RecordedCommand,
    command_line,
    device_option,
    emit,
    examples,
    output_options,
    progress,
    say,
    threads_option,
)
from qadtr_brevitas.core.extras import require

if TYPE_CHECKING:
    from qadtr_brevitas.reproduce.study.plan import StudyPlan
    from qadtr_brevitas.reproduce.study.sections import Study

_SHARED = "work"


@dataclass(frozen=True, kw_only=True)
class _StudyOptions:
    """The command line, as click read it."""

    study: str
    overrides: tuple[str, ...]
    scale: str
    output: Path | None
    work: Path | None
    shard: str | None
    processes: int
    dry_run: bool
    device: str


@click.command(
    "study",
    cls=RecordedCommand,
    epilog=examples(
        "qadtr-brevitas study table11",
        "qadtr-brevitas study table11 --scale smoke -o studies/try",
        "qadtr-brevitas study table13 budget.images=500 seeds=[0,1] --dry-run",
        "qadtr-brevitas study my_study.yaml --shard 2/3        # on three machines that share the folders",
    ),
)
@click.argument("study")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--scale", default="small", show_default=True, help="Which scale of the study: smoke, small or full.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Folder.  [default: studies/STUDY-SCALE]")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Folder of runs, patches and cells, which studies share.  [default: work, beside the output folder]",
)
@click.option(
    "--shard",
    metavar="K/N",
    help="Begin with the K-th of N shares of the parts; start N processes, on any machines that see the folders.",
)
@click.option(
    "--processes", type=click.IntRange(min=1), default=1, show_default=True, help="Processes of a training (torchrun)."
)
@click.option("--dry-run", is_flag=True, help="Only show the parts and which of them are there; make nothing.")
@device_option
@threads_option
@output_options
def command(**options: Any) -> None:
    """Train, attack, evaluate and analyze all that STUDY names, as far as it is missing, and write a report.

    STUDY is a file or one of the studies that ship (`list studies`): table02 to table16, table18 to table21, figure01,
    figure03, figure04 of the paper; all defenses on one budget, cifar10_defenses. KEY=VALUE changes one of its keys,
    for instance budget.images=500. What is finished is kept: the same command goes on after a stop, and other studies
    use the same networks and patches.
    """
    given = _StudyOptions(**options)
    from qadtr_brevitas.reproduce.study.file import load_study

    # Checked before anything heavy is imported.
    study = load_study(given.study, given.overrides, scale=given.scale)
    output = given.output or Path("studies") / f"{Path(given.study).stem}-{given.scale}"
    work = given.work or output.resolve().parent / _SHARED

    from qadtr_brevitas.evaluation.sharding import Shard
    from qadtr_brevitas.reproduce.study.plan import make_plan

    share = Shard.parse(given.shard) if given.shard else None
    plan = make_plan(study, work=work, output=output)
    if given.dry_run:
        return _show(plan)
    for package in ("jinja2", "matplotlib"):
        require(package, extra="reproduce", purpose="study")

    from qadtr_brevitas.core.device import resolve_device
    from qadtr_brevitas.reproduce.study.claims import Claims
    from qadtr_brevitas.reproduce.study.resources import StudyResources
    from qadtr_brevitas.reproduce.study.run import carry_out

    resources = StudyResources(work, str(resolve_device(given.device)), given.processes, command_line())
    with _bars() as begin:
        carry_out(plan, resources, Claims(work / "claims"), share=share, say=say, begin=begin)
    _report(study, plan, output, scale=given.scale)


@contextmanager
def _bars() -> Generator[Any]:
    """One bar, which belongs to the part that is being made."""
    with progress("study") as report:

        def begin(what: str) -> Any:
            return lambda done, total, note="": report(done, total, f"{what} {note}".rstrip())

        yield begin


def _show(plan: StudyPlan) -> None:
    from rich.table import Table

    rows = [{"part": part.name, "there": part.is_made(), "folder": str(part.folder)} for part in plan.parts]
    table = Table("part", "folder", box=None, pad_edge=False)
    for row in rows:
        table.add_row(("kept: " if row["there"] else "to do: ") + str(row["part"]), str(row["folder"]))
    emit(rows, table)
    missing = sum(not row["there"] for row in rows)
    say(f"{missing} of {len(rows)} parts are to be made; without --dry-run they are")


def _report(study: Study, plan: StudyPlan, output: Path, *, scale: str) -> None:
    from rich.console import Group

    from qadtr_brevitas.evaluation.report.files import rich_table
    from qadtr_brevitas.reproduce.study.summary import PAGE_FILE, STUDY_FILE, summary_tables, write_study

    written = write_study(study, plan, output, scale=scale, command=command_line())
    emit(
        {"output": str(output), "study": str(output / STUDY_FILE)}, Group(*map(rich_table, summary_tables(study, plan)))
    )
    say(f"wrote {', '.join(path.name for path in written)} to {output}, with a report for each network in reports/")
    say(f"open {output / PAGE_FILE} in a browser; next: qadtr-brevitas report {output} OTHER_STUDY -o report.html")
