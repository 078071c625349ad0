"""Audits as tables and files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qadtr_brevitas.auditing.finding import STATUSES, AuditReport, Finding, PrecisionAudit
from qadtr_brevitas.auditing.significance import FALSE_ALARM
from qadtr_brevitas.core.files import write_atomically, write_json
from qadtr_brevitas.core.table import Table
from qadtr_brevitas.evaluation.report.layout import EMPTY, bits, percent
from qadtr_brevitas.pipeline.directories import AUDIT_FILE, REPORT_TEXT_FILE

_HEADER = ("id", "check", "result", "numbers", "meaning")
_SHARES = ("asr", "gain", "noise", "fall", "share", "largest fall", "relative", "white-box gain", "black-box gain")


def audit_tables(audits: Sequence[AuditReport]) -> list[Table]:
    """Return a summary of all models and precisions, and then the findings of each."""
    return [summary(audits), *(_findings(audit, part) for audit in audits for part in audit.precisions)]


def summary(audits: Sequence[AuditReport]) -> Table:
    """Return the table with one line for each model and precision."""
    rows = [
        (
            audit.model,
            EMPTY if part.precision is None else bits(part.precision),
            percent(part.clean_accuracy),
            percent(part.asr),
            percent(part.worst_case),
            str(part.asr.n),
            *(str(part.count(status)) for status in STATUSES),
            " ".join(finding.id for finding in part.warnings) or EMPTY,
        )
        for audit in audits
        for part in audit.precisions
    ]
    header = (
        "model",
        "at",
        "clean accuracy",
        "ASR white-box",
        "ASR worst case",
        "n",
        "pass",
        "WARN",
        "skipped",
        "look at",
    )
    note = (
        "ASR: images that an untargeted patch of their own, at a fixed random place, turns into any wrong class, of "
        "the n images that are classified correctly without it. Worst case: by any attack of the audit."
    )
    return Table("Audit: is a low ASR robustness, or an attack that failed?", header, tuple(rows), (note,), labels=2)


def write_audits(audits: Sequence[AuditReport], folder: Path) -> Path:
    """Write audit.json, add the tables to report.md if there is one, and return the path of audit.json.

    Raises:
        CheckpointError: a file cannot be written.
    """
    write_json(folder / AUDIT_FILE, [audit.model_dump(mode="json") for audit in audits])
    report = folder / REPORT_TEXT_FILE
    if report.exists():
        tables = [table.markdown() for table in audit_tables(audits)]
        sections = [report.read_text(encoding="utf-8").rstrip(), *tables]
        text = "\n\n".join(sections) + "\n"
        write_atomically(report, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return folder / AUDIT_FILE


def _findings(audit: AuditReport, part: PrecisionAudit) -> Table:
    where = audit.model if part.precision is None else f"{audit.model} at {bits(part.precision)}"
    rows = [(f.id, f.title, f.status, _numbers(f), f.meaning) for f in part.findings]
    return Table(f"Audit of {where}", _HEADER, tuple(rows), (_note(audit, part),), labels=len(_HEADER))


def _note(audit: AuditReport, part: PrecisionAudit) -> str:
    passes = " and ".join(f"{count:,} images {name}" for name, count in part.passes.items())
    noise = f" Noise is what a gain stays below in {1 - FALSE_ALARM:.1%} of cases where there is none" + (
        "." if part.resolution is None else f"; on these images no gain below {part.resolution:.1%} is more."
    )
    return (
        f"Patches of {part.side}x{part.side} on {part.asr.n} of {audit.images} images, evaluation mode, profile "
        f"{audit.profile}, seed {audit.seed}; {passes}.{noise}"
    )


def _numbers(finding: Finding) -> str:
    return ", ".join(f"{name} {_number(name, value)}" for name, value in finding.numbers.items()) or EMPTY


def _number(name: str, value: float) -> str:
    return f"{value:.1%}" if name.startswith(_SHARES) else f"{value:.4g}"
