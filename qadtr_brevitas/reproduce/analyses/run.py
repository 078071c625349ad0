"""Runs an analysis and keeps what it found."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from qadtr_brevitas import __version__
from qadtr_brevitas.config.slots import slot_name
from qadtr_brevitas.core.errors import CheckpointError, UsageError
from qadtr_brevitas.core.files import fingerprint_facts, fingerprint_tensors
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.evaluation.report import DataFacts, ModelFacts, versions
from qadtr_brevitas.quant import allowed_precisions, frozen_weights
from qadtr_brevitas.reproduce.analyses.base import Analysis, AnalysisContext, AnalysisData, Findings
from qadtr_brevitas.reproduce.analyses.document import (
    ANALYSIS_FILE,
    AnalysisReport,
    PictureFacts,
    RecordFacts,
    TableFacts,
    read_analysis,
    write_analysis,
)
from qadtr_brevitas.reproduce.analyses.patches import finished_patches


def run(
    analysis: Analysis,
    models: Sequence[LoadedModel],
    data: AnalysisData,
    output: Path,
    *,
    seed: int,
    progress: Progress,
    device: torch.device | str,
    batch_size: int,
    command: str,
) -> Path:
    """As `run_analysis` says."""
    if not models:
        raise UsageError("an analysis needs a model: give one or more model or run directories")
    for loaded in models:
        loaded.check_data(data.test, data=data.name)
    name, settings = slot_name(analysis), TypeAdapter(type(analysis)).dump_python(analysis, mode="json")
    images = _data_facts(data)
    parts = [(loaded.name, loaded.fingerprint) for loaded in models]
    patches = [finished_patches(analysis)] if hasattr(analysis, "patches") else []
    facts = [name, settings, parts, images.fingerprint, seed, batch_size, __version__, *patches]
    made_of, train = fingerprint_facts(facts), _TrainImages(data)
    if _is_there(output, made_of, train):
        return output / ANALYSIS_FILE
    data = replace(data, load_train=data.load_train and train.load)
    where = torch.device(device)
    with ExitStack() as stack:
        for loaded in models:
            stack.enter_context(frozen_weights(loaded.model.to(where).eval()))
        findings = analysis.run(AnalysisContext(models, data, output, seed, where, batch_size, progress))
    report = AnalysisReport(
        analysis=name,
        title=findings.title,
        settings=settings,
        made_of=made_of,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        versions=versions(),
        seed=seed,
        device=str(where),
        data=images,
        train=train.used,
        models=tuple(_model_facts(loaded) for loaded in models),
        **_found(findings),
    )
    return write_analysis(report, output)


@dataclass(frozen=True)
class _TrainImages:
    """The training images, loaded once, and only where an analysis makes patches."""

    data: AnalysisData

    def load(self) -> Split:
        """The images."""
        return self._split

    @cached_property
    def fingerprint(self) -> str:
        """Of the images and labels, loaded for it."""
        return fingerprint_tensors([self._split.images, self._split.labels])

    @property
    def used(self) -> str | None:
        """Their fingerprint, if anyone has loaded them."""
        return self.fingerprint if "_split" in vars(self) else None

    @cached_property
    def _split(self) -> Split:
        return self.data.train()


def _is_there(output: Path, made_of: str, train: _TrainImages) -> bool:
    """True for an analysis of the same, training images among it where patches were made on them."""
    try:
        report = read_analysis(output)
    except CheckpointError:
        return False
    if report.made_of != made_of or not all((output / picture.file).is_file() for picture in report.pictures):
        return False
    return report.train is None or train.data.load_train is None or report.train == train.fingerprint


def _found(findings: Findings) -> dict[str, Any]:
    return {
        "records": tuple(RecordFacts(**asdict(record)) for record in findings.records),
        "tables": tuple(TableFacts(**asdict(table)) for table in findings.tables),
        "pictures": tuple(PictureFacts(**asdict(picture)) for picture in findings.pictures),
    }


def _data_facts(data: AnalysisData) -> DataFacts:
    split = data.test
    return DataFacts(
        name=data.name,
        settings=dict(data.settings),
        images=len(split),
        available=split.available,
        image_size=split.image_size,
        classes=split.classes,
        fingerprint=fingerprint_tensors([split.images, split.labels]),
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
