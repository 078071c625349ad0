"""The results of a study: study.json, the tables, and every score as CSV."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import pytest

from qadtr_brevitas.evaluation import Grid, evaluate
from qadtr_brevitas.evaluation.certification import Certification
from qadtr_brevitas.reproduce.study.resources import StudyResources
from qadtr_brevitas.reproduce.study.scores import UNSEEN_MEAN
from qadtr_brevitas.reproduce.study.summary import left_open, write_study
from tests.reproduce.study.support import CERTIFYING, plan_study, run, write_study_file
from tests.reproduce.study.test_plan import KINDS, PROTOCOL

pytestmark = pytest.mark.slow


def test_a_whole_study_writes_its_scores(tmp_path: Path) -> None:
    file = write_study_file(tmp_path)
    study, plan, work = plan_study(file)
    made = run(file)
    assert [name.split(":")[0] for name in made if "model" not in name][:2] == ["train plain", "make patches"]
    assert sorted(path.name for path in (work / "runs").iterdir()) == sorted(
        step.folder.name for step in plan.steps if step.name in ("train plain", "train fixed-4")
    )
    written = write_study(study, plan, tmp_path / "out", scale="small", command="qadtr-brevitas study x")
    assert all(path.is_file() for path in written)
    facts = json.loads((tmp_path / "out" / "study.json").read_text())
    assert facts["reports"] == ["reports/plain", "reports/fixed-4", "reports/ptq"]
    assert facts["rows"]["fixed-4"] == {
        "label": "Fixed",
        "paper": None,
        "seed": 0,
        "model": "fixed",
        "evaluation": "main",
        "precision": "4",
    }
    assert left_open(study) == ()
    assert len(left_open(study.model_copy(update={"paper": "table11"}))) > 0
    figures = (tmp_path / "out" / "figures.csv").read_text().splitlines()
    assert figures[0].startswith("model,label,evaluation,seed,precision,what,threat,made_on,made_at")
    rows = list(csv.DictReader(figures))
    found = {(row["model"], row["precision"], row["what"]): row for row in rows}
    assert {row["what"] for row in rows} >= {"clean accuracy", "random patch"}
    patch = found["plain", "4", "lavan, white-box"]
    assert (patch["made_on"], patch["made_at"], patch["threat"]) == ("plain", "4", "white-box")
    assert ("plain", "4", "lavan, made at 32") in found
    # Accuracy under an attack on every pixel is what it leaves of the clean accuracy.
    attacked = found["fixed", "4", "pgd steps=1, white-box: accuracy"]
    clean = found["fixed", "4", "clean accuracy"]
    assert int(attacked["n"]) == int(clean["n"]) == 12
    assert float(attacked["value"]) <= float(clean["value"])
    assert float(clean["value"]) == int(clean["count"]) / 12
    assert run(file) == []
    # The same values at scale smoke are marked as what they are: no results.
    write_study(study, plan, tmp_path / "out", scale="smoke", command="")
    title = (tmp_path / "out" / "study.md").read_text().partition("\n")[0]
    assert re.match(r"# NOT A RESULT.* 12 images of shapes", title)
    assert "NOT A RESULT" in (tmp_path / "out" / "report.html").read_text()


def test_a_study_certifies_as_evaluate_does_and_shows_intervals(tmp_path: Path) -> None:
    file = write_study_file(tmp_path, study=CERTIFYING)
    study, plan, work = plan_study(file, scale="smoke")
    run(file, scale="smoke")
    write_study(study, plan, tmp_path / "out", scale="small", command="")
    (step,) = (row.step for row in plan.evaluations if row.network.name == "plain")
    reports = json.loads((step.folder / "report.json").read_text())["certified"]
    assert [(cell["precision"], cell["size"], cell["certified_accuracy"]["n"]) for cell in reports] == [
        ("32", 2, 8),
        ("32", "1x3", 8),
        ("4", 2, 8),
        ("4", "1x3", 8),
    ]
    resources = StudyResources(work, "cpu")
    grid = Grid(
        loaded_models=[resources.load_model(step.model, "plain")],
        patches=[],
        split=resources.test_images(step.model, study.budget),
        data_name="shapes",
        certifications=[Certification(2, 2)],
        certify_images=8,
    )
    alone = {cell.precision: cell.certified_accuracy.count for cell in evaluate(grid).certified}
    assert {cell["precision"]: cell["certified_accuracy"]["count"] for cell in reports if cell["size"] == 2} == alone
    rows = list(csv.DictReader((tmp_path / "out" / "figures.csv").read_text().splitlines()))
    (row,) = (r for r in rows if (r["model"], r["precision"], r["what"]) == ("plain", "4", "2x2, 4 masks: certified"))
    assert (int(row["count"]), int(row["n"])) == (alone["4"], 8)
    # Wilson's interval, by its formula.
    share, z = alone["4"] / 8, 1.959964
    middle, half = share + z**2 / 16, z * math.sqrt(share * (1 - share) / 8 + z**2 / 256)
    assert float(row["low"]) == pytest.approx(max(0, (middle - half) / (1 + z**2 / 8)), abs=1e-4)
    assert float(row["high"]) == pytest.approx((middle + half) / (1 + z**2 / 8), abs=1e-4)
    text = (tmp_path / "out" / "study.md").read_text()
    interval = f"{100 * float(row['low']):.1f} to {100 * float(row['high']):.1f}"
    (line,) = (found for found in text.splitlines() if "2x2, 4 masks: certified, 95 % interval" in found and interval)
    assert interval in line
    page = (tmp_path / "out" / "report.html").read_text()
    assert "2x2, 4 masks: certified" in page
    assert interval in page


def test_the_mean_of_unseen_patches_is_of_all_kinds(tmp_path: Path) -> None:
    file = write_study_file(tmp_path, study=PROTOCOL)
    only = ["models.fixed=null", "models.ptq=null"]
    study, plan, _ = plan_study(file, *only)
    run(file, *only)
    write_study(study, plan, tmp_path / "out", scale="small", command="")
    rows = list(csv.DictReader((tmp_path / "out" / "figures.csv").read_text().splitlines()))
    (mean,) = (row for row in rows if (row["what"], row["precision"]) == (UNSEEN_MEAN, "4"))
    assert int(mean["targets"]) == len(KINDS)
    single = {row["what"]: float(row["value"]) for row in rows if row["precision"] == "4"}
    assert single["unseen gap, white-box"] == single["gap, white-box"]
