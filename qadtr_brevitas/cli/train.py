"""`qadtr-brevitas train`."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Literal

import click

from qadtr_brevitas.cli.common import (
    LocalPath,
    command_of,
    device_option,
    emit,
    examples,
    output_options,
    progress,
    say,
    seed_option,
    threads_option,
)
from qadtr_brevitas.cli.completion import complete_keys, complete_recipes
from qadtr_brevitas.cli.start import load_libraries
from qadtr_brevitas.config import shipped
from qadtr_brevitas.pipeline.directories import METRICS_FILE, MODEL_FOLDERS


@click.command(
    "train",
    epilog=examples(
        "qadtr-brevitas train digits_qadtr",
        "qadtr-brevitas train my_recipe.yaml train.epochs=3 train.gradient=null -o runs/no_gir",
        "torchrun --standalone --nproc-per-node 2 -m qadtr_brevitas train digits_qadtr",
    ),
)
@click.argument("recipe", shell_complete=complete_recipes)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=complete_keys)
@click.option("--output", "-o", type=LocalPath(), help="Run directory.  [default: runs/RECIPE]")
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
    # A name that is wrong is found before anything heavy is imported.
    first, *defenses = shipped.split_name(recipe)
    shipped.find_recipe(first)
    for defense in defenses:
        shipped.find_defense(defense)
    load_libraries()

    from qadtr_brevitas.config import load_recipe

    resolved = load_recipe(recipe, (*overrides, *([] if seed is None else [f"seed={seed}"])))
    run = output or Path("runs") / Path(recipe).stem
    # Under torchrun only the first process talks.
    is_main = os.environ.get("RANK", "0") == "0"

    from qadtr_brevitas.cli.train_progress import TrainingProgress
    from qadtr_brevitas.exporting import check_for_target
    from qadtr_brevitas.training.loop import train

    with progress(f"training {run}") as report:
        observer = TrainingProgress(report) if is_main else None
        check = partial(check_for_target, target=resolved.quant.target)
        train(resolved, run, resume=resume, overwrite=overwrite, observer=observer, device=device, check=check)
    if observer is not None:
        _show_result(run, was_finished=not observer.total_steps)


def _show_result(run: Path, *, was_finished: bool) -> None:
    """Print the run's last accuracies, what was written, and the next command."""
    from qadtr_brevitas.cli.train_progress import accuracy_table
    from qadtr_brevitas.training.log import last_epoch

    record = last_epoch(run / METRICS_FILE)
    models = [str(run / name) for name in MODEL_FOLDERS if (run / name).is_dir()]
    data = {"run": str(run), "models": models, "record": vars(record) if record else None}
    emit(data, accuracy_table(record) if record else None)
    written = "" if was_finished else f"wrote {', '.join(models)} and {run / METRICS_FILE}; "
    say(f"{written}next: {command_of('attack', run)}")
