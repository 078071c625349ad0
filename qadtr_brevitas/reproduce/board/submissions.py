"""The reports that are handed in: found below folders, read, and named so that two people's are told apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qadtr_brevitas.auditing.finding import AuditReport
from qadtr_brevitas.auditing.store import read_audits
from qadtr_brevitas.core.errors import CheckpointError, UsageError
from qadtr_brevitas.evaluation.report import EvaluationReport, read_report
from qadtr_brevitas.pipeline.directories import REPORT_FILE


@dataclass(frozen=True)
class Submission:
    """One report as it was handed in.

    Args:
        name: what tells it apart from the others.
        file: its report.json.
        report: what it says; None if it cannot be read.
        audits: audits of its models.
        problem: why it cannot be read.
    """

    name: str
    file: Path
    report: EvaluationReport | None = None
    audits: tuple[AuditReport, ...] = ()
    problem: str = ""


def read_submissions(places: Sequence[Path]) -> list[Submission]:
    """Read the reports that folders hold, at any depth, in the order of the folders and of their paths.

    A report that cannot be read is handed in all the same, with the reason: one damaged file costs nobody else's place.

    Args:
        places: folders, or files called report.json.

    Raises:
        UsageError: a place is not there, or holds no report.
    """
    files = list(dict.fromkeys(file.resolve() for place in places for file in _reports(place)))
    return [_read(name, file) for name, file in zip(_distinct_names(files), files, strict=True)]


def _reports(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise UsageError(f"there is no folder {place}: give folders that `evaluate` or `study` wrote")
    found = sorted(place.rglob(REPORT_FILE))
    if not found:
        raise UsageError(f"{place} holds no {REPORT_FILE}: give folders that `evaluate` or `study` wrote")
    return found


def _read(name: str, file: Path) -> Submission:
    try:
        report = read_report(file)
        return Submission(name, file, report, read_audits(file.parent, report))
    except CheckpointError as error:
        return Submission(name, file, problem=str(error))


def _distinct_names(files: Iterable[Path]) -> list[str]:
    """Return the shortest ends of the folders' paths that tell them apart, without what all of them end in."""
    folders = [file.parent.parts for file in files]
    while len(folders) > 1 and min(map(len, folders)) > 1 and len({parts[-1] for parts in folders}) == 1:
        folders = [parts[:-1] for parts in folders]
    return [_shortest_end(parts, folders) for parts in folders]


def _shortest_end(parts: tuple[str, ...], others: Sequence[tuple[str, ...]]) -> str:
    for count in range(1, len(parts)):
        if sum(other[-count:] == parts[-count:] for other in others) == 1:
            return "/".join(parts[-count:])
    return "/".join(parts)
