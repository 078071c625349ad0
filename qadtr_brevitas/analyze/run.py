"""Runs an analysis and keeps what it found."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from qadtr_brevitas import __version__
from qadtr_brevitas.analyze.base import Analysis, AnalysisData, Context, Findings, Progress
from qadtr_brevitas.analyze.document import (
    ANALYSIS_FILE,
    AnalysisReport,
    PictureFacts,
    RecordFacts,
    TableFacts,
    read_analysis,
    write_analysis,
)
from qadtr_brevitas.errors import CheckpointError, UsageError
from qadtr_brevitas.fingerprints import fingerprint_facts, fingerprint_tensors
from qadtr_brevitas.quant import allowed_precisions, frozen_weights
from qadtr_brevitas.recipe.slots import slot_name
from qadtr_brevitas.report import DataFacts, ModelFacts, versions
from qadtr_brevitas.subjects import Subject


def run(
    analysis: Analysis,
    models: Sequence[Subject],
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
    for subject in models:
        subject.check_data(data.test, data=data.name)
    name, settings = slot_name(analysis), TypeAdapter(type(analysis)).dump_python(analysis, mode="json")
    images = _data_facts(data)
    parts = [(subject.name, subject.fingerprint) for subject in models]
    made_of = fingerprint_facts([name, settings, parts, images.fingerprint, seed, batch_size, __version__])
    if _is_there(output, made_of):
        return output / ANALYSIS_FILE
    where = torch.device(device)
    with ExitStack() as stack:
        for subject in models:
            stack.enter_context(frozen_weights(subject.model.to(where).eval()))
        findings = analysis.run(Context(models, data, output, seed, where, batch_size, progress))
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
        models=tuple(_model_facts(subject) for subject in models),
        **_found(findings),
    )
    return write_analysis(report, output)


def _is_there(output: Path, made_of: str) -> bool:
    try:
        report = read_analysis(output)
    except CheckpointError:
        return False
    return report.made_of == made_of and all((output / picture.file).is_file() for picture in report.pictures)


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


def _model_facts(subject: Subject) -> ModelFacts:
    return ModelFacts(
        name=subject.name,
        path=subject.path,
        fingerprint=subject.fingerprint,
        architecture=subject.info.name,
        settings=dict(subject.info.quant),
        source=subject.info.source,
        precisions=tuple(map(str, allowed_precisions(subject.model))),
    )
