"""From what folders hold to the sections of a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from qadtr_brevitas import __version__
from qadtr_brevitas.audit.tables import audit_tables
from qadtr_brevitas.page.blocks import Block, Image, Page, Section
from qadtr_brevitas.page.charts import comparison_curves, family_curves
from qadtr_brevitas.page.compare import Comparison, compare, comparison_table
from qadtr_brevitas.page.measures import analysis_measures, study_measures
from qadtr_brevitas.page.parts import AnalysisPart, Part, ReportPart, StudyPart
from qadtr_brevitas.page.provenance import analysis_facts, report_facts, study_facts
from qadtr_brevitas.page.warnings import audit_warnings
from qadtr_brevitas.paper import paper_table
from qadtr_brevitas.report.tables import tables, terminal_tables
from qadtr_brevitas.report.views import attacked_precisions, families

_PAPER_OF = {"gradients": "figure04", "size": "table21", "spatial": "table20"}
_CAPTIONS = {
    "asr": "ASR against precision, a panel for each kind of attack.",
    "patches": "The patches.",
    "examples": "Clean and patched images, and what the model sees.",
}


def build_page(parts: Sequence[Part], *, title: str, command: str = "") -> Page:
    """Everything that was read, in the order it was given.

    Args:
        parts: what folders hold.
        title: of the page.
        command: the command that makes the page.
    """
    facts = {
        "command": command or "made from Python",
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": f"qadtr-brevitas {__version__}",
    }
    return Page(title, tuple(section for part in parts for section in _sections(part)), facts)


def _sections(part: Part) -> Iterator[Section]:
    if isinstance(part, StudyPart):
        yield from _study(part)
    elif isinstance(part, AnalysisPart):
        yield _analysis(part, level=2)
    else:
        yield _report(part, level=2)


def _study(part: StudyPart) -> Iterator[Section]:
    yield Section(
        f"{part.facts.title} ({part.facts.scale})",
        study_facts(part.facts),
        tuple(_study_comparison(part)),
        remarks=_study_remarks(part),
    )
    for report in part.reports:
        note = " (unseen patches)" if part.is_unseen(report) else ""
        yield _report(report, level=3, note=note)
    for analysis in part.analyses:
        yield _analysis(analysis, level=3, compared=part.facts.paper)


def _study_comparison(part: StudyPart) -> Iterator[Block]:
    if part.facts.paper is None:
        return
    rows = part.facts.rows
    at = {model: row.precision for model, row in rows.items() if row.precision is not None}
    comparison = compare(paper_table(part.facts.paper), study_measures(part), at)
    warnings = audit_warnings(part.reports, [model for model, row in rows.items() if row.paper]) if part.reports else ()
    yield from _comparison(comparison, warnings, _row_notes(part))


def _row_notes(part: StudyPart) -> list[str]:
    """Which models stand for which row, because seeds are averaged over."""
    stand: dict[str, list[str]] = {}
    for model, row in part.facts.rows.items():
        if row.paper:
            stand.setdefault(row.paper, []).append(model if row.seed is None else f"{model} (seed {row.seed})")
    rows = [f"{row}: {', '.join(models)}" for row, models in stand.items()]
    data = {f"{p.report.data.images} images of {p.report.data.name}" for p in (*part.reports, *part.analyses)}
    rule = "Figures of several seeds, patches and targets are means; their interval is that of the smallest n."
    return [f"Here: {'; '.join(sorted(data))}.", *([f"{'; '.join(rows)}."] if rows else []), rule]


def _study_remarks(part: StudyPart) -> tuple[str, ...]:
    if part.facts.paper is None:
        return ()
    return paper_table(part.facts.paper).notes


def _comparison(comparison: Comparison, warnings: Sequence[str], notes: Sequence[str]) -> Iterator[Block]:
    if not comparison.is_empty:
        yield Block(comparison_table(comparison, notes=notes), comparison_curves(comparison), tuple(warnings))


def _report(part: ReportPart, *, level: int, note: str = "") -> Section:
    report = part.report
    warnings = audit_warnings([part], [model.name for model in report.models]) if families(report) else ()
    return Section(
        f"Evaluation {part.folder.name}{note}",
        report_facts(report),
        (*_report_tables(part, warnings), *_report_pictures(part)),
        level=level,
    )


def _report_tables(part: ReportPart, warnings: tuple[str, ...]) -> Iterator[Block]:
    """The tables to read first, then curves, then the rest on demand."""
    report = part.report
    first = terminal_tables(report)
    for table in first:
        # Without attacks of one's own there is nothing white-box to show.
        if table.rows:
            yield Block(table, warnings=warnings)
    if len(attacked_precisions(report)) > 1:
        for family in families(report):
            yield Block(image=family_curves(report, family), warnings=warnings)
    titles = {table.title for table in first}
    for table in tables(report):
        if table.rows and table.title not in titles:
            yield Block(table, folded=True, warnings=warnings)
    for number, table in enumerate(audit_tables(part.audits) if part.audits else ()):
        yield Block(table, folded=number > 0)


def _report_pictures(part: ReportPart) -> Iterator[Block]:
    for path in part.pictures:
        kind = path.stem.partition("-")[0]
        # Curves of a page are one for each kind of attack, which a phone can show.
        if kind != "asr":
            yield Block(image=_image(path, _CAPTIONS[kind]))


def _analysis(part: AnalysisPart, *, level: int, compared: str | None = None) -> Section:
    report = part.report
    blocks: list[Block] = []
    paper = _PAPER_OF.get(report.analysis)
    if paper is not None and paper != compared:
        table = paper_table(paper)
        names = {model.name: model.name for model in report.models}
        comparison = compare(table, list(analysis_measures(part, names)))
        blocks += _comparison(comparison, (), [f"Here: {', '.join(names)}.", *table.notes])
    blocks += [Block(table.table()) for table in report.tables]
    blocks += [Block(image=_image(part.folder / picture.file, picture.caption)) for picture in report.pictures]
    return Section(f"Analysis {report.analysis}: {report.title}", analysis_facts(report), tuple(blocks), level=level)


def _image(path: Path, caption: str) -> Image:
    return Image(path.read_bytes(), caption, path)
