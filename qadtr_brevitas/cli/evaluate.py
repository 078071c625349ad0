"""`qadtr-brevitas evaluate MODEL_DIR...`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from qadtr_brevitas.cli.common import (
    device_option,
    emit,
    examples,
    output_options,
    progress,
    say,
    seed_option,
    threads_option,
)
from qadtr_brevitas.cli.plugin_options import dataset_settings, find_dataset, load_split
from qadtr_brevitas.cli.recorded import RecordedCommand, command_line
from qadtr_brevitas.precision import parse_precisions
from qadtr_brevitas.recipe.slots import slot_name

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qadtr_brevitas.report import Report


@click.command(
    "evaluate",
    cls=RecordedCommand,
    epilog=examples(
        "qadtr-brevitas evaluate runs/qadtr",
        "qadtr-brevitas evaluate runs/qat runs/qadtr -o runs/report",
        "qadtr-brevitas evaluate runs/qadtr --patches runs/qat/patches --precision 8,4 --images 1000",
    ),
)
@click.argument("model_dirs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="MODEL_DIR...")
@click.option(
    "--patches",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Patch file or folder; repeat for more.  [default: MODEL_DIR/patches of each]",
)
@click.option("--precision", "precisions", help="Precisions to attack, as 32,8,4.  [default: all a model has]")
@click.option(
    "--transfer",
    type=click.Choice(["all", "float", "none"]),
    default="all",
    show_default=True,
    help="Move all patches to models and precisions they were not made on, those made at 32 bit, or none.",
)
@click.option("--images", type=click.IntRange(min=1), help="Use only so many test images, balanced over classes.")
@click.option("--batch-size", "-b", type=click.IntRange(min=1), default=256, show_default=True, help="Images at once.")
@click.option("--data", help="Data set as NAME[:ROOT].  [default: the one the models were trained on]")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Folder.  [default: MODEL_DIR/evaluation]")
@device_option
@seed_option()
@threads_option
@output_options
def command(
    model_dirs: tuple[Path, ...],
    patches: tuple[Path, ...],
    precisions: str | None,
    transfer: Literal["all", "float", "none"],
    images: int | None,
    batch_size: int,
    data: str | None,
    output: Path | None,
    device: str,
    seed: int,
) -> None:
    """Score models under attack at every precision and write a report.

    Every patch meets every model on the same test images at the same places, beside a patch of noise of its size.
    Finished parts are kept in the output folder; called again, the command goes on where it stopped.
    """
    wanted = parse_precisions(precisions.split(",")) if precisions else None
    dataset = find_dataset(model_dirs, data)
    output = output or model_dirs[0] / "evaluation"

    from qadtr_brevitas.device import resolve_device
    from qadtr_brevitas.evaluate import evaluate
    from qadtr_brevitas.gallery import draw_pictures
    from qadtr_brevitas.report.files import write_report
    from qadtr_brevitas.subjects import PATCH_FOLDER, load_patches, load_subjects

    where = resolve_device(device)
    subjects = load_subjects(model_dirs, device=where)
    contenders = load_patches(patches or [path / PATCH_FOLDER for path in model_dirs])
    everything = load_split(dataset, "test")
    split = everything if images is None else everything.balanced(images, seed=seed)
    with progress("evaluating") as report_progress:
        report = evaluate(
            subjects,
            contenders,
            split,
            output=output,
            data_name=slot_name(dataset),
            data_settings=dataset_settings(dataset),
            available=len(everything),
            precisions=wanted,
            transfer=transfer,
            seed=seed,
            batch_size=batch_size,
            device=where,
            command=command_line(),
            progress=report_progress,
        )
    pictures = draw_pictures(report, subjects, contenders, split, folder=output, device=where)
    written = write_report(report, output, pictures=pictures)
    emit(report.model_dump(mode="json"), _terminal(report))
    say(f"wrote {', '.join(path.name for path in [*written, *pictures])} to {output}")
    first = model_dirs[0]
    more = f"evaluate {first} OTHER_MODEL_DIR -o FOLDER" if len(model_dirs) == 1 else f"attack {first} --target all"
    say(f"read {output / 'report.md'}; next: qadtr-brevitas {more}")


def _terminal(report: Report) -> RenderableType:
    from rich.console import Group

    from qadtr_brevitas.report.files import rich_table
    from qadtr_brevitas.report.tables import terminal_tables

    return Group(*(rich_table(table) for table in terminal_tables(report)))
