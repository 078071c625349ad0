from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image

from qadtr_brevitas.analyze.gradient_measures import Average, cosines, input_gradients, squared_errors
from qadtr_brevitas.analyze.gradients import Gradients
from qadtr_brevitas.attacks.pixel import Fgsm, Pgd
from qadtr_brevitas.errors import UsageError
from qadtr_brevitas.precision import Precision
from qadtr_brevitas.quant import at_precision
from tests.analyze.support import LAVAN, analyze, make_subjects, shapes, values
from tests.evaluation_models import make_switchable

FAST = Gradients(attack=LAVAN, pixel=Pgd(steps=2), images=9)
WHOLE = torch.ones(2, 1, 4, 4, dtype=torch.bool)


def test_a_gradient_agrees_with_itself_and_not_with_its_opposite() -> None:
    gradient = torch.randn(2, 3, 4, 4)
    assert cosines(gradient, 3 * gradient, WHOLE).tolist() == pytest.approx([1, 1])
    assert cosines(-gradient, gradient, WHOLE).tolist() == pytest.approx([-1, -1])
    errors, share = squared_errors(2 * gradient, gradient, WHOLE)
    assert share == pytest.approx(1)
    assert errors.tolist() == pytest.approx(gradient.double().square().flatten(1).mean(dim=1).tolist())


def test_only_the_region_counts() -> None:
    ours, theirs = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    region = torch.zeros_like(WHOLE)
    region[:, :, :2, :2] = True
    ours[:, :, :2, :2] = theirs[:, :, :2, :2]
    assert cosines(ours, theirs, region).tolist() == pytest.approx([1, 1])
    assert squared_errors(ours, theirs, region)[0].tolist() == [0, 0]
    assert cosines(ours, theirs, WHOLE).max() < 0.999


def test_images_without_a_gradient_are_left_out() -> None:
    gradient = torch.randn(2, 3, 4, 4)
    gradient[0] = 0
    assert len(cosines(gradient, torch.ones_like(gradient), WHOLE)) == 1
    assert squared_errors(gradient, torch.zeros_like(gradient), WHOLE)[1] is None
    assert Average.of(torch.empty(0)) == Average(None, None, None, 0)


def test_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    found = Average.of(torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64))
    assert found.value == 0.5
    assert found.low == pytest.approx(0.5 - 1.96 * (1 / 3) ** 0.5 / 2)
    assert found.high == pytest.approx(0.5 + 1.96 * (1 / 3) ** 0.5 / 2)


def test_gradients_do_not_depend_on_the_batch_and_are_those_of_the_loss() -> None:
    model = make_switchable()
    images, labels = shapes(6).test.batch(torch.arange(6))
    four = Precision(4, 4)
    whole = input_gradients(model, four, images, labels, batch_size=6)
    torch.testing.assert_close(whole, input_gradients(model, four, images, labels, batch_size=2), rtol=1e-3, atol=1e-6)
    one = images[:1].clone().requires_grad_(True)
    with at_precision(model, four):
        torch.nn.functional.cross_entropy(model(one), labels[:1]).backward()
    torch.testing.assert_close(whole[:1], one.grad, rtol=1e-3, atol=1e-6)


def test_files_hold_every_number(tmp_path: Path) -> None:
    report = analyze(FAST, make_subjects(tmp_path, count=2), tmp_path / "out")
    # Cosine, mse and its share: three regions of the patch, two of the pixel attack.
    assert len(report.records) == 2 * 3 * (3 + 2)
    with (tmp_path / "out" / "records.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["what"] for line in lines] == [record.what for record in report.records]
    assert {line["region"] for line in lines} == {"patch", "image", "zeros around the patch"}
    for picture in report.pictures:
        with Image.open(tmp_path / "out" / picture.file) as image:
            assert image.width > 500
    assert [table.title for table in report.tables] == [f"Gradients: {x}" for x in ("cosine", "mse", "relative mse")]


def test_zeros_around_the_patch_leave_the_angle_and_make_the_error_small(tmp_path: Path) -> None:
    report = analyze(FAST, make_subjects(tmp_path), tmp_path / "out")
    patch, zeros = (
        values(report, "mse", region=name, attack="lavan 4x4")[0] for name in ("patch", "zeros around the patch")
    )
    assert patch.value
    assert zeros.value == pytest.approx(patch.value * 4 * 4 / (16 * 16))
    angles = [
        values(report, "cosine", region=name, attack="lavan 4x4")[0].value
        for name in ("patch", "zeros around the patch")
    ]
    assert angles[0] == angles[1]
    assert angles[0] is not None
    assert -1 <= angles[0] <= 1


def test_finished_patches_are_taken_and_what_is_there_is_kept(tmp_path: Path) -> None:
    subjects = make_subjects(tmp_path)
    first = analyze(FAST, subjects, tmp_path / "out")
    made = tmp_path / "out" / "patches" / "net0"
    stamp = (tmp_path / "out" / "analysis.json").stat().st_mtime_ns
    assert analyze(FAST, subjects, tmp_path / "out") == first
    assert (tmp_path / "out" / "analysis.json").stat().st_mtime_ns == stamp
    given = Gradients(patches=(str(made),), pixel=Fgsm(), images=9)
    again = analyze(given, subjects, tmp_path / "again")
    assert not (tmp_path / "again" / "patches").exists()
    cosine = [values(report, "cosine", region="patch", attack="lavan 4x4")[0].value for report in (first, again)]
    assert cosine[0] == cosine[1]


def test_a_lost_picture_is_drawn_again(tmp_path: Path) -> None:
    subjects = make_subjects(tmp_path)
    analyze(FAST, subjects, tmp_path / "out")
    (tmp_path / "out" / "cosine.png").unlink()
    analyze(FAST, subjects, tmp_path / "out")
    assert (tmp_path / "out" / "cosine.png").is_file()


def test_patches_of_another_precision_are_refused(tmp_path: Path) -> None:
    subjects = make_subjects(tmp_path, precisions=(32, 4))
    low = make_subjects(tmp_path / "low", precisions=(4,))
    analyze(FAST, subjects, tmp_path / "out")
    given = Gradients(patches=(str(tmp_path / "out" / "patches" / "net0"),), pixel=Fgsm(), images=3)
    with pytest.raises(UsageError, match=r"none of the patches in .*net0 was made at 4 bit.*--precision 4"):
        analyze(given, low, tmp_path / "other")


def test_an_attack_without_a_patch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="pgd makes no patch: choose an attack that does"):
        analyze(Gradients(attack=Pgd(steps=1)), make_subjects(tmp_path), tmp_path / "out")
