"""analysis.json: the results of an analysis and everything needed to repeat it; and its numbers as CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import Field, ValidationError

from qadtr_brevitas.core.document import Document
from qadtr_brevitas.core.errors import CheckpointError
from qadtr_brevitas.core.files import read_json, write_atomically, write_json
from qadtr_brevitas.core.table import Table
from qadtr_brevitas.evaluation.report import DataFacts, ModelFacts
from qadtr_brevitas.pipeline.directories import ANALYSIS_FILE, RECORDS_FILE

ANALYSIS_SCHEMA_VERSION = 2
# Version 1 differs only in that it does not name the training images that patches were made on.
_READABLE_VERSIONS = (1, 2)

FacetValue: TypeAlias = str | int | float


class Record(Document):
    """One measured number.

    Args:
        model: name of the model.
        precision: the precision that was measured.
        what: the quantity: `asr`, `accuracy`, `cosine`, `mse`...
        value: the number, shares in [0, 1]; None if there was nothing to measure.
        low: lower end of the 95 % interval, if there is one.
        high: upper end of the interval.
        n: number of images behind the value.
        facets: what else distinguishes the record from others, for instance the attack.
    """

    model: str
    precision: str
    what: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    facets: Mapping[str, FacetValue] = {}


class Picture(Document):
    """A PNG file in the folder of an analysis.

    Args:
        file: its name.
        caption: what it shows.
    """

    file: str
    caption: str


class StoredTable(Document):
    """A table in analysis.json; the fields are those of `Table`."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...] | None, ...]
    notes: tuple[str, ...] = ()
    labels: int = 1

    def table(self) -> Table:
        """Return the table in the form that is printed."""
        return Table(self.title, self.header, self.rows, self.notes, self.labels)


class AnalysisReport(Document):
    """The contents of analysis.json.

    `made_of` is the fingerprint of the inputs: models, test images, settings, finished patches, seed and release.
    `train` is the fingerprint of the training images that patches were made on, null if no patch was made.
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
    records: tuple[Record, ...]
    tables: tuple[StoredTable, ...]
    pictures: tuple[Picture, ...]


def read_analysis(path: Path) -> AnalysisReport:
    """Read analysis.json.

    Args:
        path: the file, or the folder that holds it.

    Raises:
        CheckpointError: the file is missing, damaged, or of a version that this release cannot read.
    """
    file = path / ANALYSIS_FILE if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"there is no analysis at {file}: make one with `qadtr-brevitas analyze`")
    content = read_json(file)
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version not in _READABLE_VERSIONS:
        raise CheckpointError(
            f"{file} has analysis schema version {version}, this release reads versions {_READABLE_VERSIONS[0]} to "
            f"{_READABLE_VERSIONS[-1]}: run `qadtr-brevitas analyze` again"
        )
    try:
        return AnalysisReport.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise CheckpointError(f"{file} is damaged: run `qadtr-brevitas analyze` again") from error


def write_analysis(report: AnalysisReport, folder: Path) -> Path:
    """Write records.csv and then, once everything else exists, analysis.json.

    Returns:
        The path of analysis.json.

    Raises:
        CheckpointError: a file cannot be written.
    """
    text = records_csv(report.records)
    write_atomically(folder / RECORDS_FILE, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    write_json(folder / ANALYSIS_FILE, report.model_dump(mode="json"))
    return folder / ANALYSIS_FILE


def records_csv(records: Sequence[Record]) -> str:
    """Return records as CSV, one line for each, with a column for each facet; shares are in [0, 1]."""
    facets = list(dict.fromkeys(name for record in records for name in record.facets))
    rows = [
        (
            *(record.model, record.precision),
            *(record.facets.get(name) for name in facets),
            *(record.what, record.value, record.low, record.high, record.n),
        )
        for record in records
    ]
    return Table("Records", ("model", "precision", *facets, "what", "value", "low", "high", "n"), tuple(rows)).csv()
