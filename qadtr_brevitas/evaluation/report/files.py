"""The files of a report: JSON for programs, Markdown for people, CSV for spreadsheets."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from qadtr_brevitas.core.files import write_atomically, write_json
from qadtr_brevitas.evaluation.report.csv_tables import cells_csv, certified_csv, worst_case_csv
from qadtr_brevitas.evaluation.report.markdown import markdown
from qadtr_brevitas.evaluation.report.schema import EvaluationReport
from qadtr_brevitas.pipeline.directories import (
    CELLS_CSV_FILE,
    CERTIFIED_FILE,
    PICTURE_PATTERNS,
    REPORT_FILE,
    REPORT_TEXT_FILE,
    WORST_CASE_FILE,
)


def write_report(
    report: EvaluationReport, folder: Path, *, pictures: Sequence[Path] = (), summary: str = ""
) -> list[Path]:
    """Write report.json, report.md, cells.csv, worst_case.csv and, if there are certifications, certified.csv.

    Pictures and tables that an earlier report left in the folder are removed if this report does not have them.

    Args:
        report: the report.
        folder: the folder; created if it is missing.
        pictures: PNG files of the report in the same folder, which report.md shows.
        summary: Markdown to begin report.md with.

    Returns:
        The paths of the files.

    Raises:
        CheckpointError: a file cannot be written.
    """
    texts = {
        REPORT_TEXT_FILE: markdown(report, pictures=[picture.name for picture in pictures], summary=summary),
        CELLS_CSV_FILE: cells_csv(report),
        WORST_CASE_FILE: worst_case_csv(report),
        **({CERTIFIED_FILE: certified_csv(report)} if report.certified else {}),
    }
    # First, so that an interruption does not leave them beside the numbers of another report.
    _remove_earlier(folder, keep=[*texts, *(picture.name for picture in pictures)])
    write_json(folder / REPORT_FILE, report.model_dump(mode="json"))
    for name, text in texts.items():
        write_atomically(folder / name, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
    return [folder / name for name in (REPORT_FILE, *texts)]


def _remove_earlier(folder: Path, *, keep: Sequence[str]) -> None:
    """Remove the optional files of an earlier report; without a report.json the files are not ours to remove."""
    if not (folder / REPORT_FILE).is_file():
        return
    for pattern in (*PICTURE_PATTERNS, CERTIFIED_FILE):
        for file in folder.glob(pattern):
            if file.name not in keep:
                # If the folder is not writable, the write that follows raises the error.
                with suppress(OSError):
                    file.unlink()
