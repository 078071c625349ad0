"""The inputs of a page, read from folders: evaluations, studies and analyses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from qadtr_brevitas.auditing.finding import AuditReport
from qadtr_brevitas.auditing.store import read_audits
from qadtr_brevitas.core.errors import CheckpointError, UsageError
from qadtr_brevitas.evaluation.report import EvaluationReport, read_report
from qadtr_brevitas.pipeline.directories import (
    ANALYSIS_FILE,
    CELL_FOLDER,
    PICTURE_PATTERNS,
    REPORT_FILE,
    STUDY_FILE,
)
from qadtr_brevitas.reproduce.analyses.document import AnalysisReport, read_analysis
from qadtr_brevitas.reproduce.page.study_file import StudyFacts, read_study


@dataclass(frozen=True)
class ReportInput:
    """The report of an evaluation, with its audits.

    Args:
        folder: folder of the report.
        report: the report.
        audits: audits of its models.
        pictures: its PNG files.
    """

    folder: Path
    report: EvaluationReport
    audits: tuple[AuditReport, ...]
    pictures: tuple[Path, ...]


@dataclass(frozen=True)
class AnalysisInput:
    """An analysis and its folder."""

    folder: Path
    report: AnalysisReport


@dataclass(frozen=True)
class StudyInput:
    """A study: reports and analyses that belong together, often those of one table of the paper."""

    folder: Path
    facts: StudyFacts
    reports: tuple[ReportInput, ...]
    analyses: tuple[AnalysisInput, ...]


PageInput: TypeAlias = ReportInput | AnalysisInput | StudyInput


def read_inputs(folders: Sequence[Path]) -> list[PageInput]:
    """Read folders that `evaluate`, `analyze` and `study` wrote.

    Raises:
        UsageError: a folder does not exist, is given twice or holds none of them, or the reports of a study cannot be
            compared.
        CheckpointError: a file is missing, damaged or of another version.
    """
    resolved = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, resolved, strict=True):
        if resolved.count(place) > 1:
            raise UsageError(f"{folder} is given twice: name each folder once")
    return [_read(folder) for folder in folders]


def _read(folder: Path) -> PageInput:
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}: give one that `evaluate`, `analyze` or `study` wrote")
    if (folder / STUDY_FILE).is_file():
        return _read_study(folder)
    if (folder / ANALYSIS_FILE).is_file():
        return _read_analysis(folder)
    if (folder / REPORT_FILE).is_file():
        return _read_report(folder)
    if (folder / CELL_FOLDER).is_dir():
        raise UsageError(
            f"{folder} holds an unfinished evaluation: give the command that started it again to resume it"
        )
    raise UsageError(
        f"{folder} holds no {STUDY_FILE}, {ANALYSIS_FILE} or {REPORT_FILE}: give a folder that `evaluate`, "
        "`analyze` or `study` wrote"
    )


def _read_report(folder: Path) -> ReportInput:
    pictures = [path for pattern in PICTURE_PATTERNS for path in sorted(folder.glob(pattern))]
    report = read_report(folder)
    return ReportInput(folder, report, read_audits(folder, report), tuple(pictures))


def _read_analysis(folder: Path) -> AnalysisInput:
    report = read_analysis(folder)
    for picture in report.pictures:
        if not (folder / picture.file).is_file():
            raise CheckpointError(f"{folder} lacks {picture.file}: run its command again, `{report.command}`")
    return AnalysisInput(folder, report)


def _read_study(folder: Path) -> StudyInput:
    facts = read_study(folder)
    members = [_read_member(folder, name) for name in (*facts.reports, *facts.analyses)]
    reports = tuple(member for member in members if isinstance(member, ReportInput))
    analyses = tuple(member for member in members if isinstance(member, AnalysisInput))
    _check_images(folder, reports)
    _check_weights(reports)
    _check_rows(folder, facts, [*reports, *analyses])
    return StudyInput(folder, facts, reports, analyses)


def _read_member(folder: Path, name: str) -> PageInput:
    try:
        return _read(folder / name)
    except UsageError as error:
        raise CheckpointError(f"the study in {folder} is incomplete ({error})") from error


def _check_images(folder: Path, reports: Sequence[ReportInput]) -> None:
    """Raise if the reports of one table are of different images."""
    for other in reports[1:]:
        first = reports[0]
        if first.report.data.fingerprint != other.report.data.fingerprint:
            raise UsageError(
                f"{first.folder} and {other.folder} in the study {folder} are of different test images "
                f"({_images(first.report)}, {_images(other.report)}) and cannot be compared: evaluate both on the same "
                "data set and number of images"
            )


def _check_weights(reports: Sequence[ReportInput]) -> None:
    """Raise if one name stands for different weights."""
    known: dict[str, tuple[str, Path]] = {}
    for report in reports:
        for model in report.report.models:
            fingerprint, folder = known.setdefault(model.name, (model.fingerprint, report.folder))
            if fingerprint != model.fingerprint:
                raise UsageError(
                    f"model {model.name!r} has other weights in {report.folder} than in {folder}: run the study again, "
                    "which evaluates what has changed"
                )


def _check_rows(folder: Path, facts: StudyFacts, members: Sequence[ReportInput | AnalysisInput]) -> None:
    measured = {model.name for member in members for model in member.report.models}
    if unknown := sorted(facts.rows.keys() - measured):
        raise CheckpointError(
            f"the study in {folder} has a row {unknown[0]!r}, which none of its reports has: run the study again"
        )


def _images(report: EvaluationReport) -> str:
    return f"{report.data.images} of {report.data.name}"
