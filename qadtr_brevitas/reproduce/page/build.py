"""From what folders hold to the sections of a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from qadtr_brevitas.auditing.tables import audit_tables
from qadtr_brevitas.core.version import __version__
from qadtr_brevitas.evaluation.report import EvaluationReport
from qadtr_brevitas.evaluation.report.summaries import tables, terminal_tables
from qadtr_brevitas.evaluation.report.views import attacked_precisions, families
from qadtr_brevitas.reproduce.page.blocks import Block, Image, Page, PageSection
from qadtr_brevitas.reproduce.page.charts import comparison_curves, family_curves
from qadtr_brevitas.reproduce.page.compare import PaperComparison, compare, comparison_table
from qadtr_brevitas.reproduce.page.measures import ModelNames, analysis_measures, study_measures
from qadtr_brevitas.reproduce.page.merge import merge_reports
from qadtr_brevitas.reproduce.page.parts import AnalysisInput, Part, ReportInput, StudyInput
from qadtr_brevitas.reproduce.page.provenance import analysis_facts, read_recipes, report_facts, study_facts
from qadtr_brevitas.reproduce.page.warnings import audit_warnings
from qadtr_brevitas.reproduce.paper import paper_table

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


def _sections(part: Part) -> Iterator[PageSection]:
    if isinstance(part, StudyInput):
        yield from _study(part)
    elif isinstance(part, AnalysisInput):
        yield _analysis(part, level=2)
    else:
        yield _report(part, level=2)


def _study(part: StudyInput) -> Iterator[PageSection]:
    yield PageSection(
        f"{part.facts.title} ({part.facts.scale})",
        study_facts(part.facts),
        tuple(_study_comparison(part)),
        remarks=paper_table(part.facts.paper).notes if part.facts.paper else (),
        recipes=read_recipes([member.report for member in (*part.reports, *part.analyses)]),
    )
    for evaluation, reports in _by_evaluation(part).items():
        yield _evaluation(evaluation, reports)
    for analysis in part.analyses:
        yield _analysis(analysis, level=3, compared=part.facts.paper)


def _by_evaluation(part: StudyInput) -> dict[str, list[ReportInput]]:
    """The reports that belong side by side: a study has one for each model."""
    found: dict[str, list[ReportInput]] = {}
    for report in part.reports:
        rows = [part.facts.rows[model.name] for model in report.report.models if model.name in part.facts.rows]
        found.setdefault(rows[0].evaluation if rows else "", []).append(report)
    return found


def _study_comparison(part: StudyInput) -> Iterator[Block]:
    if part.facts.paper is None:
        return
    rows, table = part.facts.rows, paper_table(part.facts.paper)
    at = {model: row.precision for model, row in rows.items() if row.precision is not None}
    comparison = compare(table, study_measures(part), at)
    attacked = table.what in ("asr", "accuracy") and part.reports
    measured = {model.name for report in part.reports for model in report.report.models}
    shown = [model for model, row in rows.items() if row.paper and model in measured]
    warnings = audit_warnings(part.reports, shown) if attacked else ()
    yield from _comparison(comparison, warnings, _row_notes(part))


def _row_notes(part: StudyInput) -> list[str]:
    """Which models stand for which row, because seeds are averaged over."""
    stand: dict[str, list[str]] = {}
    for model, row in part.facts.rows.items():
        if row.paper:
            stand.setdefault(row.paper, []).append(model if row.seed is None else f"{model} (seed {row.seed})")
    rows = [f"{row}: {', '.join(models)}" for row, models in stand.items()]
    data = {f"{p.report.data.images} images of {p.report.data.name}" for p in (*part.reports, *part.analyses)}
    rule = "Figures of several seeds, patches and targets are means; their interval is that of the smallest n."
    return [f"Here: {'; '.join(sorted(data))}.", *([f"{'; '.join(rows)}."] if rows else []), rule]


def _comparison(comparison: PaperComparison, warnings: Sequence[str], notes: Sequence[str]) -> Iterator[Block]:
    if not comparison.is_empty:
        yield Block(comparison_table(comparison, notes=notes), comparison_curves(comparison), tuple(warnings))


def _report(part: ReportInput, *, level: int) -> PageSection:
    blocks = (*_report_tables(part.report, [part]), *_report_pictures(part))
    return PageSection(
        f"Evaluation {part.folder.name}",
        report_facts(part.report),
        blocks,
        level=level,
        recipes=read_recipes([part.report]),
    )


def _evaluation(name: str, parts: Sequence[ReportInput]) -> PageSection:
    """All models of a study under the same attacks, side by side."""
    report = merge_reports([part.report for part in parts])
    pictures = [replace(block, folded=True) for part in parts for block in _report_pictures(part)]
    title = f"Evaluation {name}" if name else f"Evaluation {parts[0].folder.name}"
    return PageSection(title, report_facts(report), (*_report_tables(report, parts), *pictures), level=3)


def _report_tables(report: EvaluationReport, parts: Sequence[ReportInput]) -> Iterator[Block]:
    """The tables to read first, then curves, then the rest on demand."""
    warnings = audit_warnings(parts, [model.name for model in report.models]) if families(report) else ()
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
    audits = [audit for part in parts for audit in part.audits]
    for number, table in enumerate(audit_tables(audits) if audits else ()):
        yield Block(table, folded=number > 0)


def _report_pictures(part: ReportInput) -> Iterator[Block]:
    for path in part.pictures:
        kind = path.stem.partition("-")[0]
        # Curves of a page are one for each kind of attack, which a phone can show.
        if kind != "asr":
            yield Block(image=_image(path, _CAPTIONS[kind]))


def _analysis(part: AnalysisInput, *, level: int, compared: str | None = None) -> PageSection:
    report = part.report
    blocks: list[Block] = []
    paper = _PAPER_OF.get(report.analysis)
    if paper is not None and paper != compared:
        table = paper_table(paper)
        comparison = compare(table, list(analysis_measures(part, ModelNames({}, {}))))
        models = ", ".join(model.name for model in report.models)
        blocks += _comparison(comparison, (), [f"Here: {models}.", *table.notes])
    blocks += [Block(table.table()) for table in report.tables]
    blocks += [Block(image=_image(part.folder / picture.file, picture.caption)) for picture in report.pictures]
    return PageSection(
        f"Analysis {report.analysis}: {report.title}",
        analysis_facts(report),
        tuple(blocks),
        level=level,
        # A study shows those of all its parts once.
        recipes=read_recipes([report]) if level == 2 else {},
    )


def _image(path: Path, caption: str) -> Image:
    return Image(path.read_bytes(), caption, path)
