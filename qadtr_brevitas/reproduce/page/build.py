"""Building a page: the sections for what folders hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from qadtr_brevitas import __version__
from qadtr_brevitas.auditing.headline import Headline, headline
from qadtr_brevitas.auditing.tables import audit_tables
from qadtr_brevitas.evaluation.report import EvaluationReport
from qadtr_brevitas.evaluation.report.summaries import tables, terminal_tables
from qadtr_brevitas.evaluation.report.views import attacked_precisions, families
from qadtr_brevitas.pipeline.directories import EVALUATION_FOLDER
from qadtr_brevitas.reproduce.page.audit_warnings import audit_warnings
from qadtr_brevitas.reproduce.page.blocks import Page, PageBlock, PageImage, PageSection
from qadtr_brevitas.reproduce.page.charts import comparison_curves, family_curves
from qadtr_brevitas.reproduce.page.compare import PaperComparison, compare, comparison_table
from qadtr_brevitas.reproduce.page.inputs import AnalysisInput, PageInput, ReportInput, StudyInput
from qadtr_brevitas.reproduce.page.measurements import PaperNames, analysis_measurements, study_measurements
from qadtr_brevitas.reproduce.page.merge import merge_reports
from qadtr_brevitas.reproduce.page.provenance import read_recipes, report_provenance, study_provenance
from qadtr_brevitas.reproduce.paper import paper_table

_PAPER_TABLES: Mapping[str, str] = {"gradients": "figure04", "size": "table21", "spatial": "table20"}
"""The table or figure of the paper that an analysis is compared with."""
_CAPTIONS = {
    "asr": "ASR against precision, a panel for each kind of attack.",
    "certified": "Accuracy that no patch can change (certified), and that of the prediction under masks (defended).",
    "patches": "The patches.",
    "examples": "Clean and patched images, and what the model sees.",
}


def build_page(inputs: Sequence[PageInput], *, title: str, command: str = "") -> Page:
    """Return the page of all inputs, in their order.

    Args:
        inputs: what folders hold.
        title: title of the page.
        command: the command that makes the page.
    """
    facts = {
        "command": command or "made from Python",
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": f"qadtr-brevitas {__version__}",
    }
    return Page(title, tuple(section for item in inputs for section in _sections(item)), facts)


def _sections(item: PageInput) -> Iterator[PageSection]:
    if isinstance(item, StudyInput):
        yield from _study_sections(item)
    elif isinstance(item, AnalysisInput):
        yield _analysis_section(item, level=2)
    else:
        yield _report_section(item)


def _study_sections(study: StudyInput) -> Iterator[PageSection]:
    by_evaluation = _reports_by_evaluation(study)
    first = next(iter(by_evaluation), None)
    yield PageSection(
        f"{study.facts.title} ({study.facts.scale})",
        study_provenance(study.facts),
        tuple(_study_comparison(study)),
        headline=None if first is None else study_headlines(study)[first],
        remarks=paper_table(study.facts.paper).notes if study.facts.paper else (),
        recipes=read_recipes([member.report for member in (*study.reports, *study.analyses)]),
    )
    for evaluation, reports in by_evaluation.items():
        section = _evaluation_section(evaluation, reports)
        yield replace(section, headline=None) if evaluation == first else section
    for analysis in study.analyses:
        yield _analysis_section(analysis, level=3, already_compared=study.facts.paper)


def study_headlines(study: StudyInput) -> dict[str, Headline | None]:
    """Return what a study says in short, for each of its evaluations by name."""
    return {name: _headline(reports) for name, reports in _reports_by_evaluation(study).items()}


def _headline(reports: Sequence[ReportInput]) -> Headline | None:
    audits = [audit for report in reports for audit in report.audits]
    return headline(merge_reports([report.report for report in reports]), audits)


def _reports_by_evaluation(study: StudyInput) -> dict[str, list[ReportInput]]:
    """Return the reports that belong side by side: a study has one report for each network."""
    found: dict[str, list[ReportInput]] = {}
    for report in study.reports:
        rows = [study.facts.rows[model.name] for model in report.report.models if model.name in study.facts.rows]
        found.setdefault(rows[0].evaluation if rows else "", []).append(report)
    return found


def _study_comparison(study: StudyInput) -> Iterator[PageBlock]:
    if study.facts.paper is None:
        return
    rows, table = study.facts.rows, paper_table(study.facts.paper)
    precisions = {model: row.precision for model, row in rows.items() if row.precision is not None}
    comparison = compare(table, study_measurements(study), precisions)
    measured = {model.name for report in study.reports for model in report.report.models}
    shown = [model for model, row in rows.items() if row.paper and model in measured]
    is_attacked = table.what in ("asr", "accuracy") and study.reports
    warnings = audit_warnings(study.reports, shown) if is_attacked else ()
    yield from _comparison_block(comparison, warnings, _study_notes(study))


def _study_notes(study: StudyInput) -> list[str]:
    """Return notes on the images, on the models behind each row, and on means over seeds."""
    models_by_row: dict[str, list[str]] = {}
    for model, row in study.facts.rows.items():
        if row.paper:
            name = model if row.seed is None else f"{model} (seed {row.seed})"
            models_by_row.setdefault(row.paper, []).append(name)
    rows = "; ".join(f"{row}: {', '.join(models)}" for row, models in models_by_row.items())
    reports = [member.report for member in (*study.reports, *study.analyses)]
    images = "; ".join(sorted({f"{report.data.images} images of {report.data.name}" for report in reports}))
    rule = "Values of several seeds, patches and targets are means; their interval is that of the smallest n."
    return [f"Here: {images}.", *([f"{rows}."] if rows else []), rule]


def _comparison_block(
    comparison: PaperComparison, warnings: Sequence[str], notes: Sequence[str]
) -> Iterator[PageBlock]:
    if not comparison.is_empty:
        yield PageBlock(comparison_table(comparison, notes=notes), comparison_curves(comparison), tuple(warnings))


def _report_section(report: ReportInput) -> PageSection:
    folder = report.folder.resolve()
    # An evaluation lies in the folder of its model, unless another one was chosen.
    name = folder.parent.name if folder.name == EVALUATION_FOLDER else folder.name
    return PageSection(
        f"Evaluation {name}",
        report_provenance(report.report),
        (*_report_tables(report.report, [report]), *_report_pictures(report)),
        recipes=read_recipes([report.report]),
        headline=_headline([report]),
    )


def _evaluation_section(name: str, reports: Sequence[ReportInput]) -> PageSection:
    """Return the section of all networks of a study under the same attacks, side by side."""
    merged = merge_reports([report.report for report in reports])
    pictures = [replace(block, folded=True) for report in reports for block in _report_pictures(report)]
    title = f"Evaluation {name or reports[0].folder.name}"
    blocks = (*_report_tables(merged, reports), *pictures)
    return PageSection(title, report_provenance(merged), blocks, level=3, headline=_headline(reports))


def _report_tables(report: EvaluationReport, inputs: Sequence[ReportInput]) -> Iterator[PageBlock]:
    """Yield the first curves, and folded the other curves and all tables."""
    attacked = families(report)
    warnings = audit_warnings(inputs, [model.name for model in report.models]) if attacked else ()
    if len(attacked_precisions(report)) > 1:
        for number, family in enumerate(attacked):
            yield PageBlock(image=family_curves(report, family), folded=number > 0, warnings=warnings)
    first = terminal_tables(report)
    titles = {table.title for table in first}
    others = [table for table in tables(report) if table.title not in titles]
    for table in (*first, *others):
        # The table is empty if no attack was made on the models themselves.
        if table.rows:
            yield PageBlock(table, folded=True, warnings=warnings)
    audits = [audit for item in inputs for audit in item.audits]
    for table in audit_tables(audits) if audits else ():
        yield PageBlock(table, folded=True)


def _report_pictures(report: ReportInput) -> Iterator[PageBlock]:
    """Yield the pictures, of which the examples of one model are seen at once: those of several fill a screen each."""
    first = next((path for path in report.pictures if path.stem.startswith("examples")), None)
    for path in report.pictures:
        kind = path.stem.partition("-")[0]
        # The page draws its own curves, one picture for each kind of attack, which fit on a phone.
        if kind != "asr":
            yield PageBlock(image=_image(path, _CAPTIONS[kind]), folded=path != first)


def _analysis_section(analysis: AnalysisInput, *, level: int, already_compared: str | None = None) -> PageSection:
    report = analysis.report
    blocks: list[PageBlock] = []
    paper = _PAPER_TABLES.get(report.analysis)
    if paper is not None and paper != already_compared:
        table = paper_table(paper)
        comparison = compare(table, list(analysis_measurements(analysis, PaperNames({}, {}))))
        models = ", ".join(model.name for model in report.models)
        blocks += _comparison_block(comparison, (), [f"Here: {models}.", *table.notes])
    blocks += [PageBlock(stored.table()) for stored in report.tables]
    blocks += [PageBlock(image=_image(analysis.folder / p.file, p.caption)) for p in report.pictures]
    return PageSection(
        f"Analysis {report.analysis}: {report.title}",
        report_provenance(report),
        tuple(blocks),
        level=level,
        # The section of a study shows the recipes of all its members.
        recipes=read_recipes([report]) if level == 2 else {},
    )


def _image(path: Path, caption: str) -> PageImage:
    return PageImage(path.read_bytes(), caption, path)
