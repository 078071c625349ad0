"""What a study costs, counted from its plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qadtr_brevitas.attacks.a_qapa import AQapa
from qadtr_brevitas.attacks.pixel import Pgd
from qadtr_brevitas.config import load_recipe
from qadtr_brevitas.reproduce.study.cost import Work, attack_work, estimate, seconds_per_image
from tests.reproduce.study.support import CERTIFYING, RECIPE, STUDY, plan_study, write_study_file


def test_an_attack_is_counted_by_the_passes_it_makes() -> None:
    assert attack_work(Pgd(steps=7), 8).attack == 7
    assert attack_work(AQapa(steps=5, sizes=(3,)), 8).attack == 5
    assert attack_work(AQapa(steps=0, sizes=(3,)), 8).attack == 0
    # Universal patches are improved by as many steps as the patches of one image.
    assert attack_work(AQapa(steps=5, sizes=(3,), universal=1.0), 8).attack == 5


def test_the_steps_of_a_study_are_counted(tmp_path: Path) -> None:
    _, plan, _ = plan_study(write_study_file(tmp_path), scale="smoke")
    rows, left_out = estimate(plan, device=torch.device("cpu"), measure=lambda recipe, device: Work(1, 10, 100))
    by_kind = {row.kind: row for row in rows}
    # Two networks, 96 images and 2 epochs each.
    assert by_kind["train"].work == Work(training=2 * 96 * 2)
    # At 32 and 4 bit on the one, at 4 on the other: 3 steps of 64 images, and 12 held-out images at both ends.
    assert by_kind["make patches"].work == Work(forward=3 * 2 * 12, attack=3 * 3 * 64)
    # One step of PGD on 12 images at each of the three, the images it makes, patches, clean images and noise.
    plain, fixed = 12 * (2 + 2) * 2 + 12 * 2 * 2, 12 * (1 + 2) + 12
    assert by_kind["evaluate"].work == Work(forward=plain + fixed, attack=3 * 12)
    assert all(r.seconds == r.work.forward + 10 * r.work.attack + 100 * r.work.training for r in rows)
    assert left_out == []


def test_certificates_are_counted_as_if_every_image_were_proved(tmp_path: Path) -> None:
    _, plan, _ = plan_study(write_study_file(tmp_path, study=CERTIFYING), scale="smoke")
    rows, _ = estimate(plan, device=torch.device("cpu"), measure=lambda recipe, device: Work(1, 10, 100))
    (work,) = (row.work for row in rows if row.kind == "evaluate")
    # Clean images and noise at two precisions, and of each size 4 masks and their 6 pairs on 8 of the 12 images.
    assert work == Work(forward=12 * 2 * 2 + 8 * 2 * 2 * (4 + 6))
    _, plan, _ = plan_study(
        write_study_file(tmp_path, study=CERTIFYING), "evaluations.certified.certify.images=500", scale="smoke"
    )
    rows, _ = estimate(plan, device=torch.device("cpu"), measure=lambda recipe, device: Work(1, 10, 100))
    (work,) = (row.work for row in rows if row.kind == "evaluate")
    assert work == Work(forward=12 * 2 * 2 + 12 * 2 * 2 * (4 + 6))


def test_searches_for_the_worst_masks_are_counted(tmp_path: Path) -> None:
    recipe = RECIPE.replace("validate_every: 2", "validate_every: 2, masks: {mode: greedy, patches: [2], grid: 2}")
    _, plan, _ = plan_study(write_study_file(tmp_path, recipe=recipe), "models.fixed=null", scale="smoke")
    rows, _ = estimate(plan, device=torch.device("cpu"), measure=lambda recipe, device: Work(1, 10, 100))
    (work,) = (row.work for row in rows if row.kind == "train")
    # Of 0.3 of the images one mask among 4, of 0.7 two in turn.
    assert work.training == 96 * 2
    assert work.forward == pytest.approx(96 * 2 * 4 * (0.3 + 2 * 0.7))


def test_times_of_an_image_are_those_of_its_kinds_of_passes() -> None:
    found = seconds_per_image(load_recipe("digits_smoke+uniform"), torch.device("cpu"), repeats=1)
    assert 0 < found.forward < found.attack < 1
    assert 0 < found.training < 1


def test_patches_that_are_made_in_an_unknown_way_are_left_out(tmp_path: Path) -> None:
    study = STUDY.replace("{{name: lavan, size: 3, steps: 3}}, targets: [0]", "{{name: random-patch, size: 3}}")
    _, plan, _ = plan_study(write_study_file(tmp_path, study=study), scale="smoke")
    rows, left_out = estimate(plan, device=torch.device("cpu"), measure=lambda recipe, device: Work(1, 10, 100))
    assert {row.kind for row in rows} == {"train", "evaluate"}
    assert left_out
