"""`qadtr-brevitas export MODEL_DIR`."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from qadtr_brevitas.cli.certify_options import MASK_OPTIONS, certification_of, mask_options
from qadtr_brevitas.cli.common import (
    LocalPath,
    RecordedCommand,
    check_needed,
    command_line,
    emit,
    examples,
    load_split,
    output_options,
    say,
    seed_option,
    threads_option,
    was_given,
)
from qadtr_brevitas.cli.export_tables import export_tables
from qadtr_brevitas.cli.option_values import PatchSizes
from qadtr_brevitas.cli.phases import phases
from qadtr_brevitas.cli.start import check_data, check_models, load_libraries
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.patch_size import PatchSize
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.core.registry import FORMATS
from qadtr_brevitas.pipeline.directories import check_export_output, name_of_model, patch_files, patch_folder

if TYPE_CHECKING:
    from qadtr_brevitas.attacks.patch import Patch
    from qadtr_brevitas.data.base import Dataset
    from qadtr_brevitas.evaluation.certification import Certification
    from qadtr_brevitas.exporting import ExportReport


_BUILD = ("board", "fps", "part")


@dataclass(frozen=True, kw_only=True)
class _ExportOptions:
    """The command line, as click read it."""

    model_dir: Path
    precisions: tuple[str, ...]
    form: str
    output: Path | None
    overwrite: bool
    verify: bool
    images: int
    patches: tuple[Path, ...]
    tolerance: float
    estimate: bool
    emulate: bool | None
    board: str
    fps: int
    part: str
    batch: str
    baseline: bool
    defend: tuple[PatchSize, ...] | None
    certify_masks: int | None
    certify_method: Literal["double-masking", "one-round"]
    certify_fill: Literal["mean", "interpolate"]
    certify_tta: Literal["none", "flip", "shift", "flip-shift"]
    certify_overlap: int
    data: str | None
    seed: int


@click.command(
    "export",
    cls=RecordedCommand,
    epilog=examples(
        "qadtr-brevitas export runs/qadtr --precision 4 --format qonnx",
        "qadtr-brevitas export models/resnet18 -p w8a8 -f qcdq --images 1000 -o exports/resnet18",
        "qadtr-brevitas export runs/qadtr -p 4 -f qcdq --patches runs/qat/patches",
        "qadtr-brevitas export runs/masked -p 4 -f qcdq --defend 5",
        "qadtr-brevitas export models/resnet20_finn -p 4 -p 2 -f finn --estimate",
    ),
)
@click.argument("model_dir", type=click.Path(path_type=Path))
@click.option(
    "--precision",
    "-p",
    "precisions",
    required=True,
    multiple=True,
    metavar="w4a4|4",
    help="Precision to export, one the model has; give it again for more.",
)
@click.option("--format", "-f", "form", type=click.Choice(FORMATS.names()), required=True, help="What to write.")
@click.option(
    "--output",
    "-o",
    type=LocalPath(),
    help="Folder; with several precisions, of one for each.  [default: exports/MODEL-PRECISION-FORMAT]",
)
@click.option("--overwrite", is_flag=True, help="Replace an export that is there, and nothing else.")
@click.option(
    "--verify/--no-verify", default=True, show_default=True, help="Execute the file and compare it with the network."
)
@click.option(
    "--images",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Test images to compare on, or all of fewer.",
)
@click.option(
    "--patches",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Patch file or folder whose success is compared too.  [default: those of MODEL_DIR made at the precision]",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0, min_open=True),
    default=0.02,
    show_default=True,
    help="Largest difference of the median image's logits, in shares of the largest logit.",
)
@click.option(
    "--batch", default="1", show_default=True, metavar="N|dynamic", help="How many images the file takes at once."
)
@click.option("--baseline", is_flag=True, help="Write the float network beside it, as float.onnx.")
@click.option("--estimate", is_flag=True, help="finn: show look-up tables, memory, multipliers and images per second.")
@click.option(
    "--emulate/--no-emulate",
    default=None,
    help="finn, hls4ml: have the compiler execute what it makes of the network.  [default: where it is installed]",
)
@click.option("--board", default="Pynq-Z1", show_default=True, help="finn: board to build for.")
@click.option(
    "--fps", type=click.IntRange(min=1), default=100, show_default=True, help="finn: images per second to fold for."
)
@click.option("--part", default="xc7z020clg400-1", show_default=True, help="hls4ml: FPGA part to build for.")
@click.option(
    "--defend",
    metavar="SIZE",
    type=PatchSizes(),
    help="Write masks of patches of this size, as 5 or 3x10, beside the file: run.py --defend answers through them.",
)
@mask_options
@click.option("--data", help="Data set as NAME[:ROOT].  [default: the one the model was trained on]")
@seed_option()
@threads_option
@output_options
def command(**options: Any) -> None:
    """Write a model at one precision as a file for other tools, and prove that it computes the same.

    qonnx holds any bit-widths, as Brevitas writes them; qcdq is standard ONNX, up to 8 bit, and ort the same with
    BatchNorms merged, which onnxruntime runs in integers (below 8 bit the biases that it rounds often move too much).
    integers holds packed weights and the operations between integers, which numpy alone, or C, computes.
    finn and hls4ml are folders to build with these FPGA compilers, for models made by `convert --target`. The file is
    executed on test images and under the model's patches; one that computes something else than rounding explains is
    not kept. Beside it lie labels, preprocessing, test vectors, and run.py, which runs it without PyTorch.
    """
    given = _ExportOptions(**options)
    _check_unverified(given)
    certification = _certification(given)
    outputs = _outputs(given)
    check_models([given.model_dir])
    check_data(given.data)
    load_libraries()

    from qadtr_brevitas.evaluation.entries import load_models
    from qadtr_brevitas.exporting import BuildTarget, check_build_options, export, find_format, parse_batch
    from qadtr_brevitas.exporting.estimate import missing_compiler
    from qadtr_brevitas.pipeline.datasets import find_dataset
    from qadtr_brevitas.quant import precisions_or_all

    form, build = find_format(given.form), BuildTarget(board=given.board, fps=given.fps, part=given.part)
    batch = parse_batch(given.batch)
    check_build_options([name for name in _BUILD if was_given(name)], build, form.compiler, form.name)
    dataset = find_dataset([given.model_dir], given.data, report=say) if given.verify else None
    (loaded,) = load_models([given.model_dir])
    # Before the first of several is made.
    precisions_or_all(loaded.model, list(outputs))
    split = None
    if dataset is not None:
        split = load_split(dataset, "test", limit=given.images, seed=given.seed)
        loaded.check_data(split, data=given.data or "of the model")
    possible = form.compiler is not None and not missing_compiler(form.compiler)
    emulate = given.verify and possible if given.emulate is None else given.emulate
    reports: list[ExportReport] = []
    for wanted, output in outputs.items():
        with phases(f"exporting {wanted}") as report_progress:
            report = export(
                loaded,
                wanted,
                form,
                output,
                split=split,
                patches=_patches(given, wanted) if given.verify else [],
                tolerance=given.tolerance,
                batch=batch,
                baseline=given.baseline,
                resize=_resize(dataset),
                build=build,
                with_estimate=given.estimate,
                emulate=emulate,
                certification=certification,
                seed=given.seed,
                command=command_line(),
                progress=report_progress,
            )
        reports.append(report)
        say(f"wrote {output}; the network is {output / form.file}; next: python {output / 'run.py'} --check")
    if form.caution:
        say(form.caution)
    if reports[0].unchecked:
        say(f"{reports[0].unchecked}, or build as README.md says")
    found = [
        report.to_dict() | {"output": str(output)} for report, output in zip(reports, outputs.values(), strict=True)
    ]
    emit(found[0] if len(found) == 1 else found, export_tables(reports))


def _resize(dataset: Dataset | None) -> int | None:
    """Return to how many pixels a data set resizes the shorter side of pictures; None if it does not."""
    size, crop = getattr(dataset, "image_size", None), getattr(dataset, "crop", None)
    return floor(size / (crop or 1.0)) if size and hasattr(dataset, "root") else None


def _check_unverified(given: _ExportOptions) -> None:
    for name in ("images", "patches", "tolerance", "data"):
        if was_given(name) and not given.verify:
            raise UsageError(f"--{name} is for comparing the file with the network: leave out --no-verify or --{name}")


def _certification(given: _ExportOptions) -> Certification | None:
    check_needed(*MASK_OPTIONS, needs="--defend 5", is_there=given.defend is not None)
    if given.defend is None:
        return None
    (size, *others) = given.defend
    if others:
        raise UsageError(
            "--defend takes one size, of the largest patch to defend against: masks of it hide smaller ones"
        )
    return certification_of(given, size)


def _outputs(given: _ExportOptions) -> dict[Precision, Path]:
    """Return the folder for each precision."""
    wanted = list(dict.fromkeys(map(Precision.parse, given.precisions)))
    name = name_of_model(given.model_dir)
    outputs: dict[Precision, Path] = {}
    for precision in wanted:
        bits = str(precision).replace("32", "float").replace(":", "-")
        one = given.output if len(wanted) == 1 or given.output is None else given.output / bits
        outputs[precision] = one or Path("exports") / f"{name}-{bits}-{given.form}"
    for output in outputs.values():
        check_export_output(output, overwrite=given.overwrite)
    return outputs


def _patches(given: _ExportOptions, precision: Precision) -> list[tuple[str, Patch]]:
    from qadtr_brevitas.evaluation.entries import load_patches

    own = patch_folder(given.model_dir)
    if given.patches:
        return [(patch_entry.name, patch_entry.patch) for patch_entry in load_patches(given.patches)]
    found = load_patches([own]) if patch_files(own) else []
    return [(c.name, c.patch) for c in found if str(c.patch.meta.get("precision")) == str(precision)]
