"""How figures were made, in words: command, recipe, seed, versions."""

from __future__ import annotations

from collections.abc import Iterable

from qadtr_brevitas.analyze.document import AnalysisReport
from qadtr_brevitas.page.study import StudyFacts
from qadtr_brevitas.report import ModelFacts, Report


def report_facts(report: Report) -> dict[str, str]:
    """Of an evaluation."""
    return _facts(report)


def analysis_facts(report: AnalysisReport) -> dict[str, str]:
    """Of an analysis."""
    settings = ", ".join(f"{name}={value}" for name, value in report.settings.items())
    return {**_facts(report), "settings": settings}


def study_facts(facts: StudyFacts) -> dict[str, str]:
    """Of a study."""
    rows = [
        f"{name} ({row.label}{'' if row.seed is None else f', seed {row.seed}'})" for name, row in facts.rows.items()
    ]
    return {
        "command": facts.command,
        "scale": facts.scale,
        "models": ", ".join(rows),
        "versions": _versions(facts.versions),
    }


def _facts(report: Report | AnalysisReport) -> dict[str, str]:
    data = report.data
    used = f"all {data.images}" if data.images == data.available else f"{data.images} of {data.available}"
    return {
        "command": report.command or "made from Python",
        "recipes": _recipes(report.models),
        "data": f"{data.name}, {used} images of the {data.split} split",
        "seed": str(report.seed),
        "device": report.device,
        "made": report.created,
        "versions": _versions(report.versions),
    }


def _recipes(models: Iterable[ModelFacts]) -> str:
    return ", ".join(f"{model.name}: {model.source or 'none'} ({model.architecture})" for model in models)


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())
