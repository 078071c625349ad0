"""`qadtr-brevitas train`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from qadtr_brevitas.cli.common import (
    command_of,
    device_option,
    emit,
    examples,
    is_quiet,
    output_options,
    progress,
    say,
    seed_option,
    stderr,
    threads_option,
)
from qadtr_brevitas.pipeline.directories import METRICS_FILE, MODEL_FOLDERS

if TYPE_CHECKING:
    from rich.table import Table

    from qadtr_brevitas.core.progress import Progress
    from qadtr_brevitas.training.log import EpochRecord, TrainingObserver


@click.command(
    "train",
    epilog=examples(
        "qadtr-brevitas train digits_qadtr",
        "qadtr-brevitas train my_recipe.yaml train.epochs=3 train.gradient=null -o runs/no_gir",
        "torchrun --standalone --nproc-per-node 2 -m qadtr_brevitas train digits_qadtr",
    ),
)
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Run directory.  [default: runs/RECIPE]")
@click.option(
    "--resume",
    type=click.Choice(["auto", "never"]),
    default="auto",
    show_default=True,
    help="Go on where a run in the directory stopped, or refuse a directory that holds one.",
)
@click.option("--overwrite", is_flag=True, help="With --resume never: delete the run in the directory first.")
@seed_option(default=None)
@device_option
@threads_option
@output_options
def command(
    recipe: str,
    overrides: tuple[str, ...],
    output: Path | None,
    resume: Literal["auto", "never"],
    overwrite: bool,
    seed: int | None,
    device: str,
) -> None:
    """Train a switchable quantized model as RECIPE says: a file, or the name of a shipped recipe.

    KEY=VALUE changes a key of the recipe, for instance train.epochs=3; --seed is short for seed=. Repeat the command
    to resume an interrupted run.
    """
    from qadtr_brevitas.config import load_recipe

    # Checked before anything heavy is imported.
    resolved = load_recipe(recipe, (*overrides, *([] if seed is None else [f"seed={seed}"])))
    run = output or Path("runs") / Path(recipe).stem
    # Under torchrun only the first process talks.
    is_main = os.environ.get("RANK", "0") == "0"

    from qadtr_brevitas.training.loop import train

    with progress(f"training {run}") as report:
        train(
            resolved,
            run,
            resume=resume,
            overwrite=overwrite,
            observer=_observer(report) if is_main else None,
            device=device,
        )
    if is_main:
        _tell(run)


def _observer(report: Progress) -> TrainingObserver:
    """Progress on a terminal; off it, one line per epoch. Both on stderr."""
    from qadtr_brevitas.training.log import StepRecord, TrainingObserver

    console = stderr()

    class ProgressObserver(TrainingObserver):
        total_steps = epochs = 0

        def on_start(self, *, step: int, total_steps: int, epochs: int) -> None:
            self.total_steps, self.epochs = total_steps, epochs
            report(step, total_steps)

        def on_step(self, record: StepRecord) -> None:
            note = f"epoch {record.epoch + 1}/{self.epochs} loss {record.loss:.3f} {record.images_per_s:.0f} images/s"
            report(record.step, self.total_steps, note)

        def on_epoch(self, record: EpochRecord) -> None:
            if is_quiet():
                return
            if console.is_terminal and record.val_accuracy:
                console.print(_table(record))
            elif not console.is_terminal:
                say(_line(record, self.epochs))

        def on_message(self, message: str) -> None:
            say(message)

    return ProgressObserver()


def _table(record: EpochRecord) -> Table:
    """Return a table of the accuracy per precision of one validation, with the metrics of the epoch below."""
    from rich.table import Table

    accuracy = record.val_accuracy or {}
    caption = ", ".join(_metrics(record.means)) or None
    table = Table(f"accuracy (%) on {record.split} images, at", *accuracy, caption=caption)
    table.add_row(_when(record), *(f"{100 * value:.2f}" for value in accuracy.values()))
    return table


def _when(record: EpochRecord) -> str:
    return "finished model" if record.kind == "final" else f"epoch {record.epoch + 1}"


def _line(record: EpochRecord, epochs: int) -> str:
    """One epoch as a line of plain text."""
    means = record.means
    head = _when(record) if record.kind == "final" else f"{_when(record)}/{epochs} ({record.phase})"
    parts = [f"loss {means['loss']:.4f}, {means['images_per_s']:.0f} images/s"] if means else []
    parts += _metrics(means)
    if record.val_accuracy:
        figures = ", ".join(f"{p}: {100 * value:.2f}" for p, value in record.val_accuracy.items())
        parts.append(f"{record.split} accuracy (%) at {figures}")
    return f"{head}: {'; '.join(parts)}"


def _metrics(means: Mapping[str, float]) -> list[str]:
    """Return the figures that objective, regularizers and gradient rule name, as words."""
    shown = {name: value for name, value in means.items() if name not in ("loss", "images_per_s")}
    return [f"{name.replace('_', ' ')} {value:.3f}" for name, value in shown.items()]


def _tell(run: Path) -> None:
    """Print the run's last accuracies, what was written, and the next command."""
    from qadtr_brevitas.training.log import last_epoch

    record = last_epoch(run / METRICS_FILE)
    models = [str(run / name) for name in MODEL_FOLDERS if (run / name).is_dir()]
    data = {"run": str(run), "models": models, "record": vars(record) if record else None}
    emit(data, _table(record) if record else None)
    say(f"wrote {', '.join(models)} and {run / METRICS_FILE}; next: {command_of('attack', run)}")
