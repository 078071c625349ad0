"""A report as Markdown: how it was made, its tables and pictures, and what each model, patch and attack is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qadtr_brevitas.core.table import Table
from qadtr_brevitas.evaluation.report.schema import EvaluationReport, ImageAttackFacts, PatchFacts
from qadtr_brevitas.evaluation.report.summaries import tables


def markdown(report: EvaluationReport, *, pictures: Sequence[str] = (), summary: str = "") -> str:
    """Return the whole report as GitHub-flavored Markdown.

    Args:
        report: the report.
        pictures: names of PNG files beside the Markdown file, which it shows.
        summary: Markdown to begin with.
    """
    parts = ["# Attack report", *([summary] if summary else []), _origin(report)]
    parts += [table.markdown() for table in tables(report)]
    parts += [f"![{Path(picture).stem.replace('-', ' ')}]({picture})" for picture in pictures]
    parts.append(_models(report).markdown())
    parts += [table.markdown() for table in (_patches(report), _attacks(report)) if table.rows]
    return "\n\n".join(parts) + "\n"


def _origin(report: EvaluationReport) -> str:
    """Return command, data, seed, device and versions as a list."""
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


def _models(report: EvaluationReport) -> Table:
    rows = tuple((m.name, m.architecture, m.source, m.path, m.fingerprint) for m in report.models)
    return Table("Models", ("model", "architecture", "made by", "path", "fingerprint"), rows)


def _patches(report: EvaluationReport) -> Table:
    header = ("patch", "attack", "target", "size", "made on", "at", "scored", "settings", "fingerprint")
    rows = tuple(
        (
            *(patch.name, patch.attack, patch.target, patch.size),
            *((patch.source.name, patch.source.precision) if patch.source else (None, None)),
            *(patch.variant.label if patch.variant else "as made", _settings(patch), patch.fingerprint),
        )
        for patch in report.patches
    )
    return Table("Patches", header, rows)


def _attacks(report: EvaluationReport) -> Table:
    header = ("attack", "target", "made on", "at", "passes", "settings", "fingerprint")
    rows = tuple(
        (
            *(attack.attack, attack.target, attack.source.name, attack.source.precision),
            *(_passes(attack), _settings(attack), attack.fingerprint),
        )
        for attack in report.attacks
    )
    return Table("Attacks on each image", header, rows)


def _passes(facts: ImageAttackFacts) -> str | None:
    return None if facts.passes is None else "at most {} forward, {} backward".format(*facts.passes)


def _settings(facts: PatchFacts | ImageAttackFacts) -> str:
    return ", ".join(f"{key}={value}" for key, value in facts.settings.items())
