"""`qadtr-brevitas analyze ANALYSIS MODEL_DIR... [key=value ...]`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qadtr_brevitas.cli.common import (
    RecordedCommand,
    command_line,
    command_of,
    emit,
    examples,
    load_split,
    progress,
    say,
    work_options,
)
from qadtr_brevitas.cli.completion import complete_plugins
from qadtr_brevitas.cli.start import check_data, check_models, load_libraries
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.extras import require
from qadtr_brevitas.core.registry import ANALYSES
from qadtr_brevitas.pipeline.directories import ANALYSIS_FOLDER, RECORDS_FILE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qadtr_brevitas.data.base import Dataset
    from qadtr_brevitas.reproduce.analyses import AnalysisData
    from qadtr_brevitas.reproduce.analyses.document import AnalysisReport


@click.command(
    "analyze",
    cls=RecordedCommand,
    epilog=examples(
        "qadtr-brevitas analyze gradients runs/qat",
        "qadtr-brevitas analyze features runs/qat layers='[conv1, layer2.0.conv1]'",
        "qadtr-brevitas analyze spatial runs/qat attack='{name: lavan, size: 6}' shifts='[2, 8, 18]'",
        "qadtr-brevitas analyze size runs/qat runs/qadtr sizes='[6, 8]' --images 1000",
        "qadtr-brevitas analyze pixel runs/qat attacks='[fgsm, pgd, autoattack]' eps='[0, 0.015, 0.03]'",
    ),
)
@click.argument("analysis", metavar="|".join(ANALYSES.names()), shell_complete=complete_plugins(ANALYSES))
@click.argument("arguments", nargs=-1, required=True, metavar="MODEL_DIR... [key=value ...]")
@click.option("--images", type=click.IntRange(min=1), help="Use only so many test images, balanced over classes.")
@click.option("--batch-size", "-b", type=click.IntRange(min=1), default=256, show_default=True, help="Images at once.")
@work_options(data="the one the models were trained on", output="MODEL_DIR/analysis/ANALYSIS")
def command(
    analysis: str,
    arguments: tuple[str, ...],
    images: int | None,
    batch_size: int,
    data: str | None,
    output: Path | None,
    device: str,
    seed: int,
) -> None:
    """Analyze why attacks transfer between precisions, as numbers and pictures.

    Patches that are not given are made on the training images, at 32 bit if the model has it. They are kept in the
    output folder, as are finished parts of long evaluations: give the same command again to resume an interrupted one.
    The keys of key=value are those of the analysis; `list analyses` describes them.
    """
    paths, settings = _divide(arguments)
    ANALYSES.describe(analysis)
    check_models(paths)
    check_data(data)
    output = output or paths[0] / ANALYSIS_FOLDER / analysis
    require("matplotlib", extra="report", purpose="analyze")
    load_libraries()

    from qadtr_brevitas.config.plugins import make_plugin
    from qadtr_brevitas.core.device import resolve_device
    from qadtr_brevitas.evaluation.entries import load_models
    from qadtr_brevitas.pipeline.datasets import find_dataset
    from qadtr_brevitas.reproduce.analyses import run_analysis
    from qadtr_brevitas.reproduce.analyses.document import read_analysis

    plugin = make_plugin(ANALYSES, analysis, settings)
    dataset = find_dataset(paths, data, report=say)
    where = resolve_device(device)
    models = load_models(paths, device=where)
    with progress(f"analyzing {analysis}") as report_progress:
        file = run_analysis(
            plugin,
            models,
            _read_data(dataset, images, seed=seed),
            output,
            seed=seed,
            progress=report_progress,
            device=where,
            batch_size=batch_size,
            command=command_line(),
        )
    report = read_analysis(file)
    _print(report)
    written = [file.name, RECORDS_FILE, *(picture.file for picture in report.pictures)]
    say(f"wrote {', '.join(written)} to {output}")
    say(f"next: {command_of('report', output, '-o', 'report.html')}")


def _divide(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Return the folders and the settings of the analysis; a word that is an existing path is a folder."""
    paths = [Path(word) for word in arguments if "=" not in word or Path(word).exists()]
    if not paths:
        raise UsageError("no model is given: give one or more model or run directories before key=value")
    return paths, [word for word in arguments if Path(word) not in paths]


def _read_data(dataset: Dataset, images: int | None, *, seed: int) -> AnalysisData:
    from qadtr_brevitas.config.slots import slot_name
    from qadtr_brevitas.core.plugin import plugin_settings
    from qadtr_brevitas.reproduce.analyses import AnalysisData

    test = load_split(dataset, "test", limit=images, seed=seed)
    if images is not None:
        # This raises if there are fewer images.
        test = test.balanced(images, seed=seed)
    return AnalysisData(slot_name(dataset), test, plugin_settings(dataset), lambda: dataset.load("train"))


def _print(report: AnalysisReport) -> None:
    from rich.console import Group

    emit(report.model_dump(mode="json"), Group(*(table.table().rich() for table in report.tables)))
