"""`qadtr-brevitas convert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qadtr_brevitas.cli.common import (
    emit,
    examples,
    output_options,
    say,
    seed_option,
    threads_option,
)
from qadtr_brevitas.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from qadtr_brevitas.quant import ConversionReport

_NOT_HERE = ("seed", "train")


@click.command(
    "convert",
    epilog=examples(
        "qadtr-brevitas convert cifar_resnet20 --checkpoint resnet20_cifar10.safetensors --data cifar10",
        "qadtr-brevitas convert resnet18 --pretrained --data image-folder:photos data.dataset.image_size=224",
        "qadtr-brevitas convert cifar_vgg16 --data digits quant.edge=same quant.precisions=[32,4] --dry-run",
    ),
)
@click.argument("model")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--checkpoint", help="Float weights, .safetensors or .pth.")
@click.option("--pretrained", is_flag=True, help="Let timm load its pretrained weights.")
@click.option("--data", "-d", required=True, metavar="NAME[:ROOT]", help="Data set to calibrate on.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Model directory.  [default: models/MODEL]")
@click.option("--overwrite", is_flag=True, help="Replace a model directory that is there.")
@click.option("--dry-run", is_flag=True, help="Only show what would be done to each layer; write nothing.")
@seed_option()
@threads_option
@output_options
def command(
    model: str,
    overrides: tuple[str, ...],
    checkpoint: str | None,
    pretrained: bool,
    data: str,
    output: Path | None,
    overwrite: bool,
    dry_run: bool,
    seed: int,
) -> None:
    """Convert a float timm network to a switchable quantized one and calibrate it, without training.

    The table says of every layer how it is quantized, or why it stays float. KEY=VALUE are the keys of a recipe's
    sections model, data and quant, for instance quant.edge=same.
    """
    from qadtr_brevitas.recipe import make_recipe

    name, _, root = data.partition(":")
    fields = {
        "seed": seed,
        "model": {"name": model, "pretrained": pretrained, "checkpoint": checkpoint},
        "data": {"dataset": {"name": name, **({"root": root} if root else {})}},
        # Nothing is trained; the schedule of the default recipe would ask for precisions of its own.
        "train": {"precision": {"schedule": "fixed", "choice": 32}},
    }
    if foreign := [text for text in overrides if text.split(".")[0].split("=")[0] in _NOT_HERE]:
        raise UsageError(f"{foreign[0]} does not matter to a conversion: give keys of model, data and quant")
    recipe = make_recipe(fields, overrides, source="convert")
    output = output or Path("models") / Path(model).name
    if output.exists() and not (overwrite or dry_run):
        raise UsageError(f"{output} is there already: choose another folder with -o, or replace it with --overwrite")
    report = _convert(recipe, None if dry_run else output)
    emit(report.to_dict() | {"output": None if dry_run else str(output)}, _table(report))
    if dry_run:
        say("nothing written; without --dry-run the model is calibrated and saved")
    else:
        say(f"wrote {output}; next: qadtr-brevitas attack {output} --data {data}")


def _convert(recipe: Any, output: Path | None) -> ConversionReport:
    from dataclasses import replace

    from qadtr_brevitas.build import build_split, build_switchable, calibrate_on
    from qadtr_brevitas.checkpoint import save_model

    train = build_split(recipe.data, "train", seed=recipe.seed)
    model, report, info = build_switchable(recipe, train)
    if output is not None:
        calibrate_on(model, train, recipe.quant.calibration, seed=recipe.seed)
        save_model(output, model, replace(info, source="convert"))
    return report


def _table(report: ConversionReport) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, caption_justify="left")
    for column in ("layer", "type", "parameters", "how"):
        table.add_column(column, justify="right" if column == "parameters" else "left")
    for layer in report.layers:
        table.add_row(layer.name, layer.type, f"{layer.parameters:,}" if layer.parameters else "", layer.note)
    table.caption = f"{report.quantized_share:.1%} of the parameters are quantized"
    return table
