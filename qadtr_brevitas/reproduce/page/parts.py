"""What a page is made of, read from folders: evaluations, studies and analyses.

study.json: which evaluations and analyses belong together, and which rows of the paper they answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from pydantic import TypeAdapter, ValidationError

from qadtr_brevitas.auditing.finding import AuditReport
from qadtr_brevitas.auditing.tables import AUDIT_FILE
from qadtr_brevitas.core.document import Document
from qadtr_brevitas.core.errors import CheckpointError, UsageError
from qadtr_brevitas.evaluation.cells import CELL_FOLDER
from qadtr_brevitas.evaluation.report import REPORT_FILE, EvaluationReport, read_report
from qadtr_brevitas.evaluation.report.files import PICTURE_FILES
from qadtr_brevitas.reproduce.analyses.document import ANALYSIS_FILE, AnalysisReport, read_analysis
from qadtr_brevitas.reproduce.paper import paper_table

STUDY_FILE = "study.json"

_UNSEEN = "unseen"
_BRACKETS = re.compile(r"\s*(\[[^]]*\]|\([^)]*\))")


class StudyRow(Document, extra="ignore"):
    """What a model of the reports stands for.

    `paper` is its row or column in the paper's table, null where it has none there; `seed` the seed it was trained
    with; `evaluation` the one it is of, in a study with several; `precision` the one to compare where the paper's table
    names none.
    """

    label: str
    paper: str | None = None
    seed: int | None = None
    evaluation: str = ""
    precision: str | None = None

    @property
    def is_unseen(self) -> bool:
        """True where its patches are unlike those of training."""
        return _UNSEEN in f"{self.evaluation} {self.paper}".lower()

    @property
    def subject(self) -> str:
        """What the paper calls it, without what is said in brackets: PBAT for `PBAT [30]` and `PBAT (Unseen patch)`."""
        return _BRACKETS.sub("", self.paper or self.label).strip()


class StudyFacts(Document, extra="ignore"):
    """What a page reads of study.json.

    `paper` names a table or figure; `reports` and `analyses` are folders, relative to that of the study; `rows` says of
    each model, by its name in the reports, what it stands for.
    """

    title: str
    paper: str | None = None
    scale: str
    command: str
    versions: dict[str, str]
    reports: tuple[str, ...] = ()
    analyses: tuple[str, ...] = ()
    rows: dict[str, StudyRow] = {}


def read_study(folder: Path) -> StudyFacts:
    """Reads the study.json of a folder.

    Raises:
        CheckpointError: it cannot be read.
        UsageError: it names a table that the paper does not have.
    """
    file = folder / STUDY_FILE
    try:
        facts = StudyFacts.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{file} is damaged: run the study again, finished parts are kept") from error
    if facts.paper is not None:
        paper_table(facts.paper)
    return facts


@dataclass(frozen=True)
class ReportInput:
    """An evaluation, with its audit where there is one.

    Args:
        folder: where it lies.
        report: what it found.
        audits: of its models.
        pictures: PNG files that belong to it.
    """

    folder: Path
    report: EvaluationReport
    audits: tuple[AuditReport, ...]
    pictures: tuple[Path, ...]


@dataclass(frozen=True)
class AnalysisInput:
    """An analysis."""

    folder: Path
    report: AnalysisReport


@dataclass(frozen=True)
class StudyInput:
    """A study: evaluations and analyses that answer one question, often that of a table of the paper."""

    folder: Path
    facts: StudyFacts
    reports: tuple[ReportInput, ...]
    analyses: tuple[AnalysisInput, ...]


Part: TypeAlias = ReportInput | AnalysisInput | StudyInput


def read_inputs(folders: Sequence[Path]) -> list[Part]:
    """Reads the folders that `evaluate`, `analyze` and `study` wrote.

    Raises:
        UsageError: a folder that does not exist, is given twice or holds none of them, or runs that cannot be compared.
        CheckpointError: a file that is missing, damaged or of another version.
    """
    resolved = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, resolved, strict=True):
        if resolved.count(place) > 1:
            raise UsageError(f"{folder} is given twice: name each folder once")
    return [_read(folder) for folder in folders]


def _read(folder: Path) -> Part:
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}: give one that `evaluate`, `analyze` or `study` wrote")
    if (folder / STUDY_FILE).is_file():
        return _read_study(folder)
    if (folder / ANALYSIS_FILE).is_file():
        return AnalysisInput(folder, _whole(folder, read_analysis(folder)))
    if (folder / REPORT_FILE).is_file():
        return _read_report(folder)
    if (folder / CELL_FOLDER).is_dir():
        raise UsageError(f"the work in {folder} is not finished: give the command that began it again, it goes on")
    raise UsageError(
        f"{folder} holds no {STUDY_FILE}, {ANALYSIS_FILE} or {REPORT_FILE}: give a folder that `evaluate`, "
        "`analyze` or `study` wrote"
    )


def _read_report(folder: Path) -> ReportInput:
    pictures = [path for pattern in PICTURE_FILES for path in sorted(folder.glob(pattern))]
    report = read_report(folder)
    return ReportInput(folder, report, _read_audits(folder / AUDIT_FILE, report), tuple(pictures))


def _read_audits(file: Path, report: EvaluationReport) -> tuple[AuditReport, ...]:
    if not file.is_file():
        return ()
    try:
        audits = TypeAdapter(tuple[AuditReport, ...]).validate_json(file.read_bytes())
    except ValidationError as error:
        raise CheckpointError(f"{file} is damaged: make it anew with `qadtr-brevitas evaluate --audit`") from error
    # A later evaluation without --audit leaves the file of an earlier one, maybe of other weights.
    evaluated = {model.fingerprint for model in report.models}
    return tuple(audit for audit in audits if audit.fingerprint in evaluated)


def _whole(folder: Path, report: AnalysisReport) -> AnalysisReport:
    for picture in report.pictures:
        if not (folder / picture.file).is_file():
            raise CheckpointError(f"{folder} lacks {picture.file}: give its command again, `{report.command}`")
    return report


def _read_study(folder: Path) -> StudyInput:
    facts = read_study(folder)
    reports: list[ReportInput] = []
    analyses: list[AnalysisInput] = []
    for name in (*facts.reports, *facts.analyses):
        part = _read_member(folder, name)
        if isinstance(part, ReportInput):
            reports.append(part)
        elif isinstance(part, AnalysisInput):
            analyses.append(part)
    _check_comparable(folder, reports)
    _check_rows(folder, facts, reports, analyses)
    return StudyInput(folder, facts, tuple(reports), tuple(analyses))


def _read_member(folder: Path, name: str) -> Part:
    try:
        return _read(folder / name)
    except UsageError as error:
        raise CheckpointError(f"the study in {folder} is not whole ({error})") from error


def _check_comparable(folder: Path, reports: Sequence[ReportInput]) -> None:
    """Figures of one table must be of the same images and of the same weights behind each name."""
    for part in reports[1:]:
        first, other = reports[0], part
        if first.report.data.fingerprint != other.report.data.fingerprint:
            raise UsageError(
                f"{first.folder} and {other.folder} are of different test images "
                f"({_images(first.report)}, {_images(other.report)}) and cannot be compared in the study {folder}: "
                "evaluate both on the same data set and number of images"
            )
    weights: dict[str, tuple[str, Path]] = {}
    for part in reports:
        for model in part.report.models:
            known, where = weights.setdefault(model.name, (model.fingerprint, part.folder))
            if known != model.fingerprint:
                raise UsageError(
                    f"model {model.name!r} has other weights in {part.folder} than in {where}: run the study again, it "
                    "evaluates what has changed"
                )


def _images(report: EvaluationReport) -> str:
    return f"{report.data.images} of {report.data.name}"


def _check_rows(
    folder: Path, facts: StudyFacts, reports: Sequence[ReportInput], analyses: Sequence[AnalysisInput]
) -> None:
    measured = {model.name for part in (*reports, *analyses) for model in part.report.models}
    if unknown := sorted(facts.rows.keys() - measured):
        raise CheckpointError(
            f"the study in {folder} has a row {unknown[0]!r}, which none of its reports has: run the study again"
        )
