"""A report as files: JSON to compute with, Markdown to read, CSV for a spreadsheet; and as tables for the terminal."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import StringIO
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from qadtr_brevitas.core.files import write_atomically, write_json
from qadtr_brevitas.evaluation.report.layout import Table
from qadtr_brevitas.evaluation.report.schema import EvaluationReport, ImageAttackFacts, PatchFacts, Rate
from qadtr_brevitas.evaluation.report.summaries import tables
from qadtr_brevitas.pipeline.directories import (
    CELLS_CSV_FILE,
    CERTIFIED_FILE,
    PICTURE_PATTERNS,
    REPORT_FILE,
    REPORT_TEXT_FILE,
    WORST_CASE_FILE,
)

"""What pictures of a report are called."""

_RATE = ("count", "n", "value", "low", "high")


def write_report(report: EvaluationReport, folder: Path, *, pictures: Sequence[Path] = ()) -> list[Path]:
    """Writes report.json, report.md, cells.csv, worst_case.csv and, of certifications, certified.csv.

    Pictures and tables of an earlier report in the folder that this one does not have are removed.

    Args:
        report: what to write.
        folder: where to; made if it is missing.
        pictures: PNG files in the same folder, which are those of the report, for report.md to show.

    Returns:
        The paths.

    Raises:
        CheckpointError: a file cannot be written.
    """
    texts = {
        REPORT_TEXT_FILE: markdown(report, pictures=[picture.name for picture in pictures]),
        CELLS_CSV_FILE: cells_csv(report),
        WORST_CASE_FILE: worst_case_csv(report),
        **({CERTIFIED_FILE: certified_csv(report)} if report.certified else {}),
    }
    # First, so that no stop in between leaves them beside figures that are not theirs.
    _remove_earlier(folder, keep=[*texts, *(picture.name for picture in pictures)])
    write_json(folder / REPORT_FILE, report.model_dump(mode="json"))
    for name, text in texts.items():
        _write_text(folder / name, text)
    return [folder / name for name in (REPORT_FILE, *texts)]


def markdown(report: EvaluationReport, *, pictures: Sequence[str] = ()) -> str:
    """The whole report as GitHub-flavored Markdown."""
    parts = ["# Attack report", _facts(report)]
    parts += [markdown_table(table) for table in tables(report)]
    parts += [f"![{Path(picture).stem.replace('-', ' ')}]({picture})" for picture in pictures]
    parts += [_models(report), _patches(report), _attacks(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(table: Table) -> str:
    """One table with its title as a heading and its notes below."""
    lines = [
        _line(table.header),
        "|" + "|".join(" :-- " if index < table.labels else " --: " for index in range(len(table.header))) + "|",
    ]
    lines += [_line(row) for row in table.rows if row is not None]
    notes = "\n".join(table.notes)
    return f"## {table.title}\n\n" + "\n".join(lines) + (f"\n\n{notes}" if notes else "")


def rich_table(table: Table) -> RenderableType:
    """One table for the terminal, with its title above and its notes below; print it with rich."""
    drawn = RichTable(box=box.SIMPLE_HEAD)
    for index, name in enumerate(table.header):
        drawn.add_column(Text(name), justify="left" if index < table.labels else "right", overflow="fold")
    for row in table.rows:
        if row is None:
            drawn.add_section()
        else:
            drawn.add_row(*(Text(cell) for cell in row))
    notes = [Text(note, style="dim") for note in table.notes]
    return Group(Text(table.title, style="bold"), drawn, *notes, Text())


def cells_csv(report: EvaluationReport) -> str:
    """One line for each patch or attack on each model and precision; shares are between 0 and 1."""
    names = ("asr", "asr_all", "untargeted", "clean_accuracy", "robust_accuracy")
    head = ["model", "precision", "attack", "family", "variant", "target", "threat", "source", "source_precision"]
    lines: list[list[object]] = [[*head, *(f"{name}_{part}" for name in names for part in _RATE)]]
    by_name = report.attack_facts()
    for cell in report.cells:
        facts = by_name[cell.attack]
        source = [facts.source.name, facts.source.precision] if facts.source else ["", ""]
        kind = _family(facts, by_name)
        rates: list[Rate] = [getattr(cell, name) for name in names]
        figures = [getattr(rate, part) for rate in rates for part in _RATE]
        lines.append([cell.model, cell.precision, cell.attack, *kind, cell.target, cell.threat, *source, *figures])
    return _csv(lines)


def worst_case_csv(report: EvaluationReport) -> str:
    """One line for each model, precision and scope; shares are between 0 and 1."""
    lines: list[list[object]] = [
        ["model", "precision", "scope", "attacks", "mean", *(f"robust_accuracy_{part}" for part in _RATE)]
    ]
    for case in report.worst_case:
        rate = [getattr(case.robust_accuracy, part) for part in _RATE]
        lines.append([case.model, case.precision, case.scope, case.attacks, case.mean, *rate])
    return _csv(lines)


def certified_csv(report: EvaluationReport) -> str:
    """One line for each model, precision and certification; shares are between 0 and 1."""
    names = ("clean_accuracy", "certified_accuracy")
    facts = ("model", "precision", "method", "size", "masks")
    lines: list[list[object]] = [[*facts, *(f"{name}_{part}" for name in names for part in _RATE)]]
    for cell in report.certified:
        figures = [getattr(getattr(cell, name), part) for name in names for part in _RATE]
        lines.append([*(getattr(cell, fact) for fact in facts), *figures])
    return _csv(lines)


def _remove_earlier(folder: Path, *, keep: Sequence[str]) -> None:
    """Removes what a report does not always have, if there is an earlier report; else it is none of ours."""
    if not (folder / REPORT_FILE).is_file():
        return
    for pattern in (*PICTURE_PATTERNS, CERTIFIED_FILE):
        for file in folder.glob(pattern):
            if file.name not in keep:
                # A folder that cannot be written is told by what is written next.
                with suppress(OSError):
                    file.unlink()


def _facts(report: EvaluationReport) -> str:
    data = report.data
    used = f"{data.images} of {data.available}" if data.images != data.available else f"all {data.images}"
    packages = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    return "\n".join(
        [
            f"- Command: `{report.command}`" if report.command else "- Made from Python",
            f"- Data: {data.name}, {used} images of the {data.split} split, {len(data.classes)} classes",
            f"- Seed {report.seed}, device {report.device}, {report.created}",
            f"- Versions: {packages}",
        ]
    )


def _models(report: EvaluationReport) -> str:
    rows = tuple((m.name, m.architecture, m.source, m.path, m.fingerprint) for m in report.models)
    return markdown_table(Table("Models", ("model", "architecture", "made by", "path", "fingerprint"), rows))


def _patches(report: EvaluationReport) -> str:
    header = ("patch", "attack", "target", "size", "made on", "at", "scored", "settings", "fingerprint")
    rows = tuple(
        (
            patch.name,
            patch.attack,
            "" if patch.target is None else f"{patch.target}",
            patch.size,
            patch.source.name if patch.source else "",
            patch.source.precision if patch.source else "",
            patch.variant.label if patch.variant else "as made",
            _settings(patch),
            patch.fingerprint,
        )
        for patch in report.patches
    )
    return markdown_table(Table("Patches", header, rows)) if rows else ""


def _attacks(report: EvaluationReport) -> str:
    header = ("attack", "target", "made on", "at", "settings", "fingerprint")
    rows = tuple(
        (
            attack.attack,
            "" if attack.target is None else f"{attack.target}",
            attack.source.name,
            attack.source.precision,
            _settings(attack),
            attack.fingerprint,
        )
        for attack in report.attacks
    )
    return markdown_table(Table("Attacks on each image", header, rows)) if rows else ""


def _settings(facts: PatchFacts | ImageAttackFacts) -> str:
    return ", ".join(f"{key}={value}" for key, value in facts.settings.items())


def _family(
    facts: PatchFacts | ImageAttackFacts, by_name: Mapping[str, PatchFacts | ImageAttackFacts]
) -> tuple[str, str]:
    """The family, of a moved patch that of the patch as it was made, and how it was moved."""
    variant = facts.variant if isinstance(facts, PatchFacts) else None
    return (by_name[variant.of].family, variant.label) if variant else (facts.family, "")


def _csv(lines: Sequence[Sequence[object]]) -> str:
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
