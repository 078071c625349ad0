"""A study of a tiny network on procedural shapes, whose parts take a fraction of a second."""

from __future__ import annotations

from pathlib import Path

from qadtr_brevitas.reproduce.study.claims import Claims
from qadtr_brevitas.reproduce.study.file import load_study
from qadtr_brevitas.reproduce.study.plan import StudyPlan, make_plan
from qadtr_brevitas.reproduce.study.resources import StudyResources
from qadtr_brevitas.reproduce.study.run import StudyOutcome, carry_out
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


def write_study(folder: Path, *, recipe: str = RECIPE, study: str = STUDY) -> Path:
    """The file of the study, with its recipe beside it."""
    (folder / "tiny.yaml").write_text(recipe)
    file = folder / "tiny_study.yaml"
    file.write_text(study.format(recipe=folder / "tiny.yaml"))
    return file


def planned(
    file: Path, *overrides: str, work: Path | None = None, scale: str = "small"
) -> tuple[Study, StudyPlan, Path]:
    """The study, its parts and the folder it shares."""
    study = load_study(file, overrides, scale=scale)
    work = work or file.parent / "work"
    return study, make_plan(study, work=work, output=file.parent / "out"), work


def run(file: Path, *overrides: str, work: Path | None = None, scale: str = "small") -> StudyOutcome:
    """Carries the study out."""
    _, plan, work = planned(file, *overrides, work=work, scale=scale)
    return carry_out(plan, StudyResources(work, "cpu"), Claims(work / "claims"), look_every=0.05)
