"""analysis.json: everything an analysis found and everything needed to redo it; and the same numbers as CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from qadtr_brevitas.core.document import Document
from qadtr_brevitas.core.errors import CheckpointError
from qadtr_brevitas.core.files import read_json, write_atomically, write_json
from qadtr_brevitas.evaluation.report import DataFacts, ModelFacts
from qadtr_brevitas.evaluation.report.layout import Table

ANALYSIS_FILE = "analysis.json"
RECORDS_FILE = "records.csv"
ANALYSIS_SCHEMA_VERSION = 2
# Analyses of version 1 do not say which training images patches were made on, and nothing else is different.
_READABLE = (1, 2)

_FIXED = ("model", "precision")
_VALUES = ("what", "value", "low", "high", "n")


class RecordFacts(Document):
    """One number; the fields are those of `Record`."""

    model: str
    precision: str
    what: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    facets: dict[str, Any] = {}


class TableFacts(Document):
    """One table; the fields are those of `Table`."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...] | None, ...]
    notes: tuple[str, ...] = ()
    labels: int = 1

    def table(self) -> Table:
        """As tables are drawn."""
        return Table(self.title, self.header, self.rows, self.notes, self.labels)


class PictureFacts(Document):
    """A PNG beside analysis.json."""

    file: str
    caption: str


class AnalysisReport(Document):
    """What `analysis.json` holds.

    `made_of` is the same for the same models, images, settings, finished patches, seed and release; `train` is the
    fingerprint of the training images that patches were made on, null where none were made.
    """

    schema_version: Annotated[int, Field(ge=1)] = ANALYSIS_SCHEMA_VERSION
    analysis: str
    title: str
    settings: dict[str, Any]
    made_of: str
    created: str
    command: str
    versions: dict[str, str]
    seed: int
    device: str
    data: DataFacts
    train: str | None = None
    models: tuple[ModelFacts, ...]
    records: tuple[RecordFacts, ...]
    tables: tuple[TableFacts, ...]
    pictures: tuple[PictureFacts, ...]


def read_analysis(path: Path) -> AnalysisReport:
    """Reads `analysis.json`, given the file or the folder that holds it.

    Raises:
        CheckpointError: no such file, or not an analysis this version can read.
    """
    file = path / ANALYSIS_FILE if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"no analysis at {file}: make one with `qadtr-brevitas analyze`")
    content = read_json(file)
    found = content.get("schema_version") if isinstance(content, dict) else None
    try:
        if found in _READABLE:
            return AnalysisReport.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise CheckpointError(f"{file} is damaged: make it anew with `qadtr-brevitas analyze`") from error
    raise CheckpointError(
        f"{file} has analysis schema version {found}, this release reads {_READABLE[0]} to {_READABLE[-1]}: make it "
        "anew with `qadtr-brevitas analyze`"
    )


def write_analysis(report: AnalysisReport, folder: Path) -> Path:
    """Writes records.csv and then, when all else is there, analysis.json, whose path it returns.

    Raises:
        CheckpointError: a file cannot be written.
    """
    text = records_csv(report.records)
    write_atomically(folder / RECORDS_FILE, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    write_json(folder / ANALYSIS_FILE, report.model_dump(mode="json"))
    return folder / ANALYSIS_FILE


def records_csv(records: Sequence[RecordFacts]) -> str:
    """One line for each number; shares are between 0 and 1."""
    facets = list(dict.fromkeys(name for record in records for name in record.facets))
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_FIXED, *facets, *_VALUES])
    for record in records:
        told = [record.facets.get(name, "") for name in facets]
        writer.writerow([record.model, record.precision, *told, *(getattr(record, name) for name in _VALUES)])
    return text.getvalue()
