"""Run an analysis and write its results, unless the same results are there already."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import torch

from qadtr_brevitas.config.slots import slot_name
from qadtr_brevitas.core.errors import CheckpointError, UsageError
from qadtr_brevitas.core.files import fingerprint_facts
from qadtr_brevitas.core.plugin import plugin_settings
from qadtr_brevitas.core.progress import Progress, silent
from qadtr_brevitas.core.version import __version__
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.evaluation.report import DataFacts, ModelFacts, versions
from qadtr_brevitas.pipeline.directories import ANALYSIS_FILE
from qadtr_brevitas.quant import allowed_precisions, frozen_weights
from qadtr_brevitas.reproduce.analyses.base import Analysis, AnalysisContext, AnalysisData, Findings
from qadtr_brevitas.reproduce.analyses.document import (
    AnalysisReport,
    StoredTable,
    read_analysis,
    write_analysis,
)
from qadtr_brevitas.reproduce.analyses.patches import finished_patches


def run_analysis(
    analysis: Analysis,
    models: Sequence[LoadedModel],
    data: AnalysisData,
    output: Path,
    *,
    seed: int,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    command: str = "",
) -> Path:
    """Run an analysis and write analysis.json, records.csv and pictures.

    An analysis in the folder is kept if it was made of the same models, images, patches, settings and seed by the same
    release. Finished patches count by their contents; patches that the analysis made count by their training images.

    Args:
        analysis: the analysis.
        models: the models; moved to the device and put in evaluation mode.
        data: the images.
        output: folder of the analysis.
        seed: seed of placements, attacks and all other random draws.
        progress: called after each part of the work.
        device: where to compute.
        batch_size: images in one forward pass.
        command: command line, for the report.

    Returns:
        The path of analysis.json.

    Raises:
        UsageError: there are no models, or a setting does not fit the models or the images.
        DataError: a model is for other images or another number of classes.
        CheckpointError: a file cannot be written.
    """
    if not models:
        raise UsageError("an analysis needs a model: give one or more model or run directories")
    for loaded in models:
        loaded.check_data(data.test, data=data.name)
    images, train = _data_facts(data), _TrainImages(data)
    made_of = _made_of(analysis, models, images, seed=seed, batch_size=batch_size)
    if _is_current(output, made_of, train):
        return output / ANALYSIS_FILE
    data = replace(data, load_train=data.load_train and train.load)
    device = torch.device(device)
    context = AnalysisContext(models, data, output, seed, device, batch_size, progress or silent)
    with ExitStack() as stack:
        for loaded in models:
            stack.enter_context(frozen_weights(loaded.model.to(device).eval()))
        findings = analysis.run(context)
    return write_analysis(_report(analysis, context, findings, images, made_of, train.used, command), output)


@dataclass(frozen=True)
class _TrainImages:
    """The training images, loaded once, and only if an analysis makes patches."""

    data: AnalysisData

    def load(self) -> Split:
        """Return the images."""
        return self._split

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the images and labels, which are loaded for it."""
        return self._split.fingerprint

    @property
    def used(self) -> str | None:
        """The fingerprint of the images if they were loaded, else None."""
        return self.fingerprint if "_split" in vars(self) else None

    @cached_property
    def _split(self) -> Split:
        return self.data.train()


def _made_of(
    analysis: Analysis, models: Sequence[LoadedModel], images: DataFacts, *, seed: int, batch_size: int
) -> str:
    """Return the fingerprint of everything that decides the result, except the training images."""
    facts: list[object] = [
        slot_name(analysis),
        plugin_settings(analysis),
        [(loaded.name, loaded.fingerprint) for loaded in models],
        images.fingerprint,
        seed,
        batch_size,
        __version__,
    ]
    if analysis.patches:
        facts.append(finished_patches(analysis))
    return fingerprint_facts(facts)


def _is_current(output: Path, made_of: str, train: _TrainImages) -> bool:
    """Return whether the folder holds a complete analysis of the same inputs."""
    try:
        report = read_analysis(output)
    except CheckpointError:
        return False
    if report.made_of != made_of or not all((output / picture.file).is_file() for picture in report.pictures):
        return False
    return report.train is None or train.data.load_train is None or report.train == train.fingerprint


def _report(
    analysis: Analysis,
    context: AnalysisContext,
    findings: Findings,
    images: DataFacts,
    made_of: str,
    train: str | None,
    command: str,
) -> AnalysisReport:
    return AnalysisReport(
        analysis=slot_name(analysis),
        title=findings.title,
        settings=plugin_settings(analysis),
        made_of=made_of,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        versions=versions(),
        seed=context.seed,
        device=str(context.device),
        data=images,
        train=train,
        models=tuple(map(_model_facts, context.models)),
        records=tuple(findings.records),
        tables=tuple(StoredTable(**asdict(table)) for table in findings.tables),
        pictures=tuple(findings.pictures),
    )


def _data_facts(data: AnalysisData) -> DataFacts:
    split = data.test
    return DataFacts(
        name=data.name,
        settings=dict(data.settings),
        images=len(split),
        available=split.available,
        image_size=split.image_size,
        classes=split.classes,
        fingerprint=split.fingerprint,
    )


def _model_facts(loaded: LoadedModel) -> ModelFacts:
    return ModelFacts(
        name=loaded.name,
        path=loaded.path,
        fingerprint=loaded.fingerprint,
        architecture=loaded.info.name,
        settings=dict(loaded.info.quant),
        source=loaded.info.source,
        precisions=tuple(map(str, allowed_precisions(loaded.model))),
    )
