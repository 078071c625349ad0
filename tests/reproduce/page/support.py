"""Folders as `evaluate`, `analyze` and `study` write them, with known numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qadtr_brevitas.auditing.finding import AuditReport, Finding, PrecisionAudit
from qadtr_brevitas.core.files import write_json
from qadtr_brevitas.evaluation import evaluate
from qadtr_brevitas.evaluation.metrics import Proportion
from qadtr_brevitas.evaluation.report import EvaluationReport, Rate
from qadtr_brevitas.evaluation.report.files import write_report
from qadtr_brevitas.pipeline.directories import AUDIT_FILE
from tests.evaluation.fakes import Reader, make_grid, reader, white_patch


def make_report(folder: Path, *, names: tuple[str, ...] = ("a", "b"), **grid: Any) -> EvaluationReport:
    """Write a report of models that read their images; the first is fooled at 8 and 4 bit, the others at 4 only."""
    subjects = [reader(name, Reader(fooled_at=(8, 4) if number == 0 else (4,))) for number, name in enumerate(names)]
    patches = [white_patch(f"{name}-{bits}", model=name, precision=bits) for name in names for bits in (8, 4)]
    report = evaluate(make_grid(subjects, patches, **grid), output=folder, command="qadtr-brevitas evaluate runs/a")
    write_report(report, folder)
    return report


def make_audit(folder: Path, *, model: str, fingerprint: str) -> None:
    """Write an audit with one warning at 4 bit."""
    finding = Finding(
        id="G5", title="Black box", status="WARN", meaning="a black box breaks more: gradients are masked."
    )
    rate = Rate.of(Proportion(3, 10))
    part = PrecisionAudit(
        precision="4",
        clean_accuracy=rate,
        asr=rate,
        worst_case=rate,
        side=2,
        resolution=0.1,
        passes={"forward": 1},
        findings=(finding,),
    )
    audit = AuditReport(
        model=model, fingerprint=fingerprint, profile="quick", settings={}, seed=0, images=10, precisions=(part,)
    )
    write_json(folder / AUDIT_FILE, [audit.model_dump(mode="json")])


def make_study(folder: Path, **changes: Any) -> Path:
    """Write a study of Table 11 with one evaluation."""
    content = {
        "title": "Defenses",
        "paper": "table11",
        "scale": "smoke",
        "command": "qadtr-brevitas study table11 scale=smoke",
        "versions": {"torch": "2"},
        "reports": ["seen"],
        "rows": {
            "a": {"label": "PBAT", "paper": "PBAT [30]", "seed": 0},
            "b": {"label": "QADT-R", "paper": "QADT-R (Ours)", "seed": 0, "model": "more than a page reads"},
        },
        "analyses": [],
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps(content))
    return folder


def make_whole_study(folder: Path) -> Path:
    """Write a study with a report for each model and evaluation."""
    rows = {
        f"{model} {evaluation}": {
            "label": f"{label} ({evaluation})",
            "paper": f"{label} {suffix}",
            "seed": 0,
            "evaluation": evaluation,
        }
        for evaluation, suffix in (("seen", "[30]"), ("unseen", "(Unseen patch)"))
        for model, label in (("a", "PBAT"), ("b", "QADT-R"))
    }
    make_study(folder, rows=rows, reports=[name.replace(" ", "-") for name in rows])
    for name in rows:
        make_report(folder / name.replace(" ", "-"), names=(name,))
    return folder
