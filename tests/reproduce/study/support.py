"""A study of a tiny network on procedural shapes, whose steps take a fraction of a second."""

from __future__ import annotations

from pathlib import Path

import pytest

from qadtr_brevitas.core.errors import RecipeError
from qadtr_brevitas.reproduce.study.file import load_study
from qadtr_brevitas.reproduce.study.plan import StudyPlan, make_plan
from qadtr_brevitas.reproduce.study.resources import StudyResources
from qadtr_brevitas.reproduce.study.run import StudyOutcome, run_study
from qadtr_brevitas.reproduce.study.sections import Study
from tests.training import support as support

RECIPE = """
model: {name: train_tiny_net}
data:
  dataset: {name: shapes, image_size: 8, classes: 3, train_images: 96, test_images: 30}
  augment: none
quant: {precisions: [32, 4], calibration: {samples: 32}}
train: {epochs: 2, batch_size: 16, optimizer: {lr: 0.05}, precision: uniform, validate_every: 2}
"""
STUDY = """
title: A tiny study
recipe: {recipe}
precisions: [32, 4]
models:
  plain: {{label: Plain}}
  fixed: {{label: Fixed, defense: fixed, each: [4], start: plain}}
  ptq: {{start: plain, train: false}}
attacks:
  lavan: {{attack: {{name: lavan, size: 3, steps: 3}}, targets: [0]}}
  pgd: {{attack: {{name: pgd, steps: 1}}}}
evaluations:
  main: {{attacks: [lavan, pgd]}}
budget: {{images: 12, batch_size: 12, patch_images: 24, held_out: 12, pictures: false}}
scales:
  smoke: {{models: {{ptq: null}}}}
  small: {{}}
"""
# The network `plain` alone is certified.
CERTIFYING = f"""{STUDY.partition("evaluations:")[0]}evaluations:
  certified: {{{{certify: {{{{sizes: [2, 1x3], masks: 2, images: 8}}}}, models: [plain]}}}}
budget:{STUDY.partition("budget:")[2]}"""


def write_study_file(folder: Path, *, recipe: str = RECIPE, study: str = STUDY) -> Path:
    """Write a study with its recipe beside it, and return the file of the study."""
    (folder / "tiny.yaml").write_text(recipe)
    file = folder / "tiny_study.yaml"
    file.write_text(study.format(recipe=folder / "tiny.yaml"))
    return file


def mistakes(file: Path, *overrides: str) -> str:
    """Return the error of a study that is wrong."""
    with pytest.raises(RecipeError) as caught:
        load_study(file, overrides)
    return str(caught.value)


def plan_study(
    file: Path, *overrides: str, work: Path | None = None, scale: str = "small"
) -> tuple[Study, StudyPlan, Path]:
    """Return a study, its plan, and the folder that studies share."""
    study = load_study(file, overrides, scale=scale)
    work = work or file.parent / "work"
    return study, make_plan(study, work=work, output=file.parent / "out"), work


def run(file: Path, *overrides: str, work: Path | None = None, scale: str = "small") -> list[str]:
    """Run a study, and return the names of the steps that were finished."""
    _, plan, work = plan_study(file, *overrides, work=work, scale=scale)
    return run_plan(plan, work).finished


def run_plan(plan: StudyPlan, work: Path) -> StudyOutcome:
    """Run a plan."""
    return run_study(plan, StudyResources(work, "cpu"))
