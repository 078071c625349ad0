"""How numbers were made, as text: command, recipe, seed, versions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from qadtr_brevitas.evaluation.report import EvaluationReport, ModelFacts
from qadtr_brevitas.pipeline.directories import RECIPE_FILE
from qadtr_brevitas.reproduce.analyses.document import AnalysisReport
from qadtr_brevitas.reproduce.page.study_file import StudyFacts


def report_provenance(report: EvaluationReport | AnalysisReport) -> dict[str, str]:
    """Return how an evaluation or an analysis was made, by name."""
    data = report.data
    used = f"all {data.images}" if data.images == data.available else f"{data.images} of {data.available}"
    facts = {
        "command": report.command or "made from Python",
        "recipes": ", ".join(f"{model.name}: {_origin(model)} ({model.architecture})" for model in report.models),
        "data": f"{data.name}, {used} images of the {data.split} split",
        "seed": str(report.seed),
        "device": report.device,
        "made": report.created,
        "versions": _versions(report.versions),
    }
    if isinstance(report, AnalysisReport):
        facts["settings"] = ", ".join(f"{name}={json.dumps(value)}" for name, value in report.settings.items())
    return facts


def study_provenance(facts: StudyFacts) -> dict[str, str]:
    """Return how a study was made, by name."""
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


def read_recipes(reports: Iterable[EvaluationReport | AnalysisReport]) -> dict[str, str]:
    """Return the recipes of models whose runs still exist: names of the models -> text."""
    found: dict[str, list[str]] = {}
    for model in (model for report in reports for model in report.models):
        file = Path(model.path) / RECIPE_FILE
        if model.path and file.is_file():
            found.setdefault(file.read_text(encoding="utf-8"), []).append(model.name)
    return {", ".join(dict.fromkeys(names)): text for text, names in found.items()}


def _origin(model: ModelFacts) -> str:
    """Return the recipe of a run, what made a model directory, or at least its path."""
    recipe = Path(model.path) / RECIPE_FILE
    return str(recipe) if model.path and recipe.is_file() else model.source or model.path or "made from Python"


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())
