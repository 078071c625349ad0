"""`qadtr-brevitas export MODEL_DIR`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qadtr_brevitas.cli.common import emit, examples, output_options, progress, say, seed_option, threads_option
from qadtr_brevitas.cli.plugin_options import find_dataset, load_split
from qadtr_brevitas.cli.recorded import RecordedCommand, command_line
from qadtr_brevitas.errors import UsageError
from qadtr_brevitas.precision import Precision

if TYPE_CHECKING:
    from qadtr_brevitas.attacks.patch import Patch
    from qadtr_brevitas.export import ExportReport
    from qadtr_brevitas.report.layout import Table

_FORMATS = ("qonnx", "qcdq")


@dataclass(frozen=True, kw_only=True)
class _Options:
    """The command line, as click read it."""

    model_dir: Path
    precision: str
    form: str
    output: Path | None
    overwrite: bool
    verify: bool
    images: int
    patches: tuple[Path, ...]
    tolerance: float
    data: str | None
    seed: int


@click.command(
    "export",
    cls=RecordedCommand,
    epilog=examples(
        "qadtr-brevitas export runs/qadtr --precision 4 --format qonnx",
        "qadtr-brevitas export models/resnet18 -p w8a8 -f qcdq --images 1000 -o exports/resnet18",
        "qadtr-brevitas export runs/qadtr -p 4 -f qcdq --patches runs/qat/patches",
    ),
)
@click.argument("model_dir", type=click.Path(path_type=Path))
@click.option("--precision", "-p", required=True, metavar="w4a4|4", help="Precision to export, one the model has.")
@click.option("--format", "-f", "form", type=click.Choice(_FORMATS), required=True, help="What to write.")
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), help="Folder.  [default: exports/MODEL-PRECISION-FORMAT]"
)
@click.option("--overwrite", is_flag=True, help="Replace a folder that is there.")
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
@click.option("--data", help="Data set as NAME[:ROOT].  [default: the one the model was trained on]")
@seed_option()
@threads_option
@output_options
def command(**options: Any) -> None:
    """Write a model at one precision as a file for other tools, and prove that it computes the same.

    qonnx holds any bit-widths, for FPGA compilers; qcdq is standard ONNX for onnxruntime, up to 8 bit. The file is
    executed on test images and under the model's patches; one that computes something else is not kept.
    """
    given = _Options(**options)
    wanted = Precision.parse(given.precision)
    name = given.model_dir.resolve().name
    output = given.output or Path("exports") / f"{name}-{str(wanted).replace('32', 'float')}-{given.form}"
    if output.exists() and not given.overwrite:
        raise UsageError(f"{output} is there already: choose another folder with -o, or replace it with --overwrite")
    dataset = find_dataset([given.model_dir], given.data) if given.verify else None

    from qadtr_brevitas.export import FORMATS, export
    from qadtr_brevitas.subjects import load_subjects

    (subject,) = load_subjects([given.model_dir])
    split = None
    if dataset is not None:
        split = load_split(dataset, "test", limit=given.images, seed=given.seed)
        subject.check_data(split, data=given.data or "of the model")
    with progress("verifying") as report_progress:
        report = export(
            subject,
            wanted,
            FORMATS[given.form],
            output,
            split=split,
            patches=_patches(given, wanted) if given.verify else [],
            tolerance=given.tolerance,
            seed=given.seed,
            command=command_line(),
            progress=report_progress,
        )
    emit(report.to_dict() | {"output": str(output)}, _text(report))
    say(f"wrote {output}; the network is {output / 'model.onnx'}")


def _patches(given: _Options, precision: Precision) -> list[tuple[str, Patch]]:
    from qadtr_brevitas.subjects import PATCH_FOLDER, load_patches

    own = given.model_dir / PATCH_FOLDER
    if given.patches:
        return [(contender.name, contender.patch) for contender in load_patches(given.patches)]
    found = load_patches([own]) if any(own.glob("*.safetensors")) else []
    return [(c.name, c.patch) for c in found if str(c.patch.meta.get("precision")) == str(precision)]


def _text(report: ExportReport) -> Any:
    from rich.console import Group
    from rich.text import Text

    from qadtr_brevitas.report.files import rich_table

    size = f"{report.format} at {report.precision}: {report.bytes / 1e6:.3g} MB"
    if report.agreement is None:
        return Text(f"{size}, not verified")
    return Group(Text(size), rich_table(_agreement(report)))


def _agreement(report: ExportReport) -> Table:
    from qadtr_brevitas.report.layout import Table

    found = report.agreement
    assert found is not None
    rows = [
        ("accuracy (%)", f"{100 * found.accuracy:.1f}", f"{100 * found.exported_accuracy:.1f}"),
        *((f"ASR of {p.name} (%)", f"{100 * p.asr:.1f}", f"{100 * p.exported_asr:.1f}") for p in found.patches),
    ]
    notes = (
        f"{found.images} test images, the same class for {found.same_class:.1%}. Largest difference of two logits: "
        f"{found.median_difference:.2g} in the median image, {found.max_difference:.2g} in any; the largest logit is "
        f"{found.largest_logit:.3g}.",
    )
    return Table("Exported file against PyTorch", ("", "PyTorch", "exported"), tuple(rows), notes)
