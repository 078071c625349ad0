"""`qadtr-brevitas convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qadtr_brevitas.cli.common import (
    LocalPath,
    command_of,
    emit,
    examples,
    option_block,
    output_options,
    progress,
    say,
    seed_option,
    threads_option,
    warn,
)
from qadtr_brevitas.cli.completion import complete_keys
from qadtr_brevitas.cli.conversion_table import conversion_table
from qadtr_brevitas.cli.start import check_data, load_libraries
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.registry import PTQ_METHODS, RANGE_METHODS, TARGETS
from qadtr_brevitas.pipeline.directories import check_model_output, name_of_model

if TYPE_CHECKING:
    from qadtr_brevitas.config import Recipe
    from qadtr_brevitas.data.split import Split
    from qadtr_brevitas.quant import ConversionReport

_NOT_HERE = ("seed", "train")


class _PtqMethodName(click.Choice[str]):
    """The name of a PTQ method, or one of another tool that is refused with what to take instead."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value in PTQ_METHODS.declined:
            self.fail(f"there is no {value!r}: {PTQ_METHODS.declined[value]}", param, ctx)
        return super().convert(value, param, ctx)


@dataclass(frozen=True, kw_only=True)
class _ConvertOptions:
    """The command line, as click read it."""

    model: str
    overrides: tuple[str, ...]
    checkpoint: str | None
    pretrained: bool
    data: str | None
    method: str | None
    percentile: float | None
    samples: int | None
    weights: tuple[str, ...]
    bias_correction: bool
    dynamic: bool
    target: str | None
    layers: tuple[str, ...]
    output: Path | None
    overwrite: bool
    dry_run: bool
    seed: int

    def keys(self) -> dict[str, Any]:
        """Return the recipe keys that options stand for, where the option is given, by dotted path."""
        from qadtr_brevitas.pipeline.datasets import parse_dataset_choice

        calibration = "quant.calibration"
        options = {
            "model.checkpoint": self.checkpoint,
            "model.pretrained": self.pretrained or None,
            "data.dataset": None if self.data is None else parse_dataset_choice(self.data),
            f"{calibration}.method": self._method(),
            f"{calibration}.samples": self.samples,
            f"{calibration}.weights": self._ptq_methods() or None,
            "quant.activations": "dynamic" if self.dynamic else None,
            "quant.target": self.target,
            "quant.layers": self._layers() or None,
        }
        return {path: value for path, value in options.items() if value is not None}

    def _ptq_methods(self) -> list[str]:
        last = ["bias-correction"] if self.bias_correction and "bias-correction" not in self.weights else []
        return [*self.weights, *last]

    def _layers(self) -> dict[str, Any]:
        from qadtr_brevitas.core.layer_bits import parse_layers

        return {name: patterns for text in self.layers for name, patterns in parse_layers(text).items()}

    def _method(self) -> str | dict[str, Any] | None:
        if self.percentile is None:
            return self.method
        if self.method != "percentile":
            raise UsageError(f"--percentile {self.percentile:g} needs --method percentile")
        return {"name": "percentile", "percentile": self.percentile}


_calibration_options = option_block(
    click.option(
        "--calibrate",
        "--data",
        "-d",
        "data",
        metavar="NAME[:ROOT]",
        help="Data set to calibrate on.  [default: the one that a MODEL directory was made on]",
    ),
    click.option("--method", type=click.Choice(RANGE_METHODS.names()), help="How a range is chosen.  [default: mse]"),
    click.option("--percentile", type=float, help="Percent of the magnitudes not to clip.  [default: 99.99]"),
    click.option("--samples", type=int, help="Training images to look at.  [default: 512, or all of fewer]"),
    click.option(
        "--weights",
        "-w",
        multiple=True,
        type=_PtqMethodName(PTQ_METHODS.names()),
        help="Choose levels of weights by outputs, gptq for instance; again for one method after another.",
    ),
    click.option("--bias-correction", is_flag=True, help="Keep mean outputs of layers at those of the float network."),
    click.option("--dynamic", is_flag=True, help="Take the ranges of activations from each image, at run time."),
)


@click.command(
    "convert",
    epilog=examples(
        "qadtr-brevitas convert cifar_resnet20 --checkpoint resnet20_cifar10.safetensors --calibrate cifar10",
        "qadtr-brevitas convert resnet18 --pretrained --calibrate image-folder:photos --method percentile",
        "qadtr-brevitas convert runs/float --weights gptq -o models/float_gptq",
        "qadtr-brevitas convert runs/float --method minmax --samples 256 -o models/float_ptq",
        "qadtr-brevitas convert alexnet --pretrained --calibrate image-folder:photos --dynamic",
        "qadtr-brevitas convert runs/float --target finn -o models/float_finn",
        "qadtr-brevitas convert runs/float --layers 'edge:*=4,layer3.*=w8a8,linear=8' -o models/float_mixed",
        "qadtr-brevitas convert deit_base_patch16_224 quant.first_last=same quant.precisions=[32,4] --dry-run",
    ),
)
@click.argument("model")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=complete_keys)
@click.option("--checkpoint", help="Float weights: .safetensors, .pth, or a run or model directory.")
@click.option("--pretrained", is_flag=True, help="Load the weights that timm or torchvision knows for the name.")
@_calibration_options
@click.option(
    "--target", type=click.Choice(TARGETS.names()), help="Place quantizers so that this compiler accepts the export."
)
@click.option(
    "--layers",
    multiple=True,
    metavar="NAME:PATTERN=BITS,...|FILE.json",
    help="Add a mixed precision, mixed:NAME: bit-widths by pattern of module names, the last match counts.",
)
@click.option("--output", "-o", type=LocalPath(), help="Model directory.  [default: models/MODEL]")
@click.option("--overwrite", is_flag=True, help="Replace a model directory that is there and holds nothing else.")
@click.option("--dry-run", is_flag=True, help="Only show what would be done to each layer; write nothing.")
@seed_option()
@threads_option
@output_options
def command(**options: Any) -> None:
    """Convert a float network to a switchable quantized one and calibrate it, without training.

    MODEL is a name of timm (also hf-hub:... and local-dir:...), one of torchvision that timm lacks, a function of your
    own that makes a network (package.module:function, which is imported), or the folder of a run or model, whose
    weights at 32 bit are used.

    The table shows how each layer is quantized, or why it stays float. KEY=VALUE are the keys of a recipe's
    sections model, data and quant, for instance quant.first_last=same; some of them have an option.
    """
    given = _ConvertOptions(**options)
    check_data(given.data, option="--calibrate")
    load_libraries()
    recipe, has_data = _make_recipe(given)
    output = given.output or Path("models") / name_of_model(given.model)
    if output.exists() and not (given.overwrite or given.dry_run):
        raise UsageError(f"{output} already exists: choose another folder with -o, or replace it with --overwrite")
    if not given.dry_run:
        check_model_output(output, advice="choose another folder with -o")
    report = _convert(recipe, has_data, None if given.dry_run else output)
    random = _has_random_weights(recipe)
    facts = {"output": None if given.dry_run else str(output), "random_weights": random}
    emit(report.to_dict() | facts, conversion_table(report))
    if given.dry_run:
        say("nothing written; without --dry-run the model is calibrated and saved")
    elif random:
        warn(
            f"{output} has RANDOM weights, as {recipe.model.name} was made without any: its accuracy is that of "
            "guessing, and attacks on it show nothing"
        )
        say(f"wrote {output}; next: the same command with --pretrained or --checkpoint FILE, and --overwrite")
    else:
        from qadtr_brevitas.pipeline.checkpoint import read_info

        data = "" if read_info(output).data else " --data NAME[:ROOT]"
        say(f"wrote {output}; next: {command_of('attack', output)}{data}")


def _has_random_weights(recipe: Recipe) -> bool:
    """Whether nothing gives the network weights; a function of the user's may load its own."""
    from qadtr_brevitas.models.python_functions import is_function_name

    section = recipe.model
    return section.checkpoint is None and not section.pretrained and not is_function_name(section.name)


def _make_recipe(given: _ConvertOptions) -> tuple[Recipe, bool]:
    """Return the recipe of options, overrides and, for a MODEL directory, its config; and if it names its data."""
    from qadtr_brevitas.config import make_recipe

    keys = given.keys()
    _check_overrides(given.overrides, keys)
    # Nothing is trained; the schedule of the default recipe would ask for precisions of its own.
    fields: dict[str, Any] = {"seed": given.seed, "train": {"precision": {"schedule": "fixed", "choice": 32}}}
    for path, value in {**_model_keys(given), **keys}.items():
        _put(fields, path.split("."), value)
    has_data = "data" in fields or any(text.startswith("data.dataset") for text in given.overrides)
    if not has_data and not given.dry_run:
        raise UsageError(
            "convert needs images to calibrate on: give --calibrate NAME[:ROOT], see `qadtr-brevitas list datasets`, "
            "or --dry-run, which only shows what would be done"
        )
    return make_recipe(fields, given.overrides, source="convert"), has_data


def _check_overrides(overrides: tuple[str, ...], keys: dict[str, Any]) -> None:
    names = {text: text.partition("=")[0].strip() for text in overrides}
    for text, name in names.items():
        if name.split(".")[0] in _NOT_HERE:
            raise UsageError(f"{text} has no effect on a conversion: give keys of model, data and quant")
        if name in keys or (name == "data.dataset.name" and "data.dataset" in keys):
            raise UsageError(f"{text} is also set by an option: remove one of them")


def _model_keys(given: _ConvertOptions) -> dict[str, Any]:
    """Return what MODEL stands for."""
    if not Path(given.model).expanduser().is_dir() or _is_known(given.model):
        return {"model.name": given.model}
    for option, value in (("--checkpoint", given.checkpoint), ("--pretrained", given.pretrained)):
        if value:
            raise UsageError(f"{given.model} is a folder that has weights: remove {option}")

    from qadtr_brevitas.pipeline.checkpoint import read_info

    info = read_info(given.model)
    made_on = {} if info.data is None else {"data.dataset": info.data}
    architecture = {"name": info.name, "args": info.args, "num_classes": info.num_classes}
    return {"model": {**architecture, "checkpoint": given.model}, **made_on}


def _is_known(name: str) -> bool:
    """Whether it is a name first of all, though there is a folder that is called so."""
    from qadtr_brevitas.models.create import is_model_name

    return is_model_name(name)


def _put(fields: dict[str, Any], parts: list[str], value: Any) -> None:
    for part in parts[:-1]:
        fields = fields.setdefault(part, {})
    fields[parts[-1]] = value


def _convert(recipe: Recipe, has_data: bool, output: Path | None) -> ConversionReport:
    from dataclasses import replace

    from qadtr_brevitas.exporting import check_for_target
    from qadtr_brevitas.pipeline.build import build_switchable, fit_data, no_images
    from qadtr_brevitas.pipeline.calibration import calibrate_on
    from qadtr_brevitas.pipeline.checkpoint import save_model

    if output is None and not has_data:
        model, _ = build_switchable(recipe, no_images(recipe.model))
        check_for_target(model, recipe.quant.target)
        return model.report
    recipe = fit_data(recipe, report=say)
    section = recipe.quant.calibration
    train = _load(recipe, only_size=output is None)
    model, info = build_switchable(recipe, train, only_ranges=True, report=warn)
    check_for_target(model, recipe.quant.target)
    if info.num_classes != len(train.classes):
        say(
            f"the network keeps its {info.num_classes} classes: "
            f"the images, of {len(train.classes)} classes, only serve to choose ranges"
        )
    if output is not None:
        with progress("calibrating") as report_batches:
            calibrate_on(model, train, section, seed=recipe.seed, progress=report_batches)
        save_model(output, model, replace(info, source="convert"))
    return model.report


def _load(recipe: Recipe, *, only_size: bool) -> Split:
    """Return the images to calibrate on, and no others; a single one if only their size and classes matter."""
    from qadtr_brevitas.pipeline.build import build_split
    from qadtr_brevitas.pipeline.calibration import DEFAULT_IMAGES

    limit = 1 if only_size else recipe.quant.calibration.samples or DEFAULT_IMAGES
    with progress("reading images") as report:
        return build_split(recipe.data, "train", seed=recipe.seed, limit=limit, progress=report)
