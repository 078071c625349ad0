"""How figures were made, in words: command, recipe, seed, versions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from qadtr_brevitas.evaluation.report import EvaluationReport, ModelFacts
from qadtr_brevitas.reproduce.analyses.document import AnalysisReport
from qadtr_brevitas.reproduce.page.parts import StudyFacts

RECIPE_FILE = "recipe.yaml"


def report_facts(report: EvaluationReport) -> dict[str, str]:
    """Of an evaluation."""
    return _facts(report)


def analysis_facts(report: AnalysisReport) -> dict[str, str]:
    """Of an analysis."""
    settings = ", ".join(f"{name}={json.dumps(value)}" for name, value in report.settings.items())
    return {**_facts(report), "settings": settings}


def study_facts(facts: StudyFacts) -> dict[str, str]:
    """Of a study."""
    rows = [
        f"{name} ({row.label}{'' if row.seed is None else f', seed {row.seed}'})" for name, row in facts.rows.items()
    ]
    return {
        "command": facts.command,
        "scale": facts.scale,
        # A study of analyses only has no rows.
        **({"models": ", ".join(rows)} if rows else {}),
        "versions": _versions(facts.versions),
    }


def _facts(report: EvaluationReport | AnalysisReport) -> dict[str, str]:
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


def read_recipes(reports: Iterable[EvaluationReport | AnalysisReport]) -> dict[str, str]:
    """The recipes of models, as far as their runs are still where they were: names of the models -> text."""
    found: dict[str, list[str]] = {}
    for model in (model for report in reports for model in report.models):
        file = Path(model.path) / RECIPE_FILE
        if model.path and file.is_file():
            found.setdefault(file.read_text(encoding="utf-8"), []).append(model.name)
    return {", ".join(dict.fromkeys(names)): text for text, names in found.items()}


def _recipes(models: Iterable[ModelFacts]) -> str:
    return ", ".join(f"{model.name}: {_origin(model)} ({model.architecture})" for model in models)


def _origin(model: ModelFacts) -> str:
    """The recipe of a run, what made a model directory, or at least where it is."""
    recipe = Path(model.path) / RECIPE_FILE
    return str(recipe) if model.path and recipe.is_file() else model.source or model.path or "made from Python"


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())
