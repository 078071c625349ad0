from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from qadtr_brevitas.attacks.pixel import Fgsm, Pgd
from qadtr_brevitas.core.errors import CheckpointError, UsageError
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.quant import at_precision
from qadtr_brevitas.reproduce.analyses import AnalysisData
from qadtr_brevitas.reproduce.analyses.document import read_analysis
from qadtr_brevitas.reproduce.analyses.gradients import Average, Gradients, cosines, input_gradients, squared_errors
from tests.evaluation.models import make_switchable
from tests.reproduce.analyses.support import LAVAN, analyze, make_subjects, patch_folder, shapes, values

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


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> list[LoadedModel]:
    return make_subjects(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def folder(subjects: list[LoadedModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gradients")
    analyze(FAST, subjects, folder)
    return folder


def test_files_hold_every_number(folder: Path) -> None:
    report = read_analysis(folder)
    # Cosine, mse and its share: three regions of the patch, two of the pixel attack.
    assert len(report.records) == 3 * (3 + 2)
    with (folder / "records.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["what"] for line in lines] == [record.what for record in report.records]
    assert {line["region"] for line in lines} == {"patch", "image", "zeros around the patch"}
    for picture in report.pictures:
        with Image.open(folder / picture.file) as image:
            assert image.width > 500
    assert [table.title for table in report.tables] == [f"Gradients: {x}" for x in ("cosine", "mse", "relative mse")]


def test_zeros_around_the_patch_leave_the_angle_and_make_the_error_small(folder: Path) -> None:
    report = read_analysis(folder)

    def both(what: str) -> list[float | None]:
        regions = ("patch", "zeros around the patch")
        return [values(report, what, region=region, attack="lavan 4x4")[0].value for region in regions]

    patch, zeros = both("mse")
    assert patch
    assert zeros == pytest.approx(patch * 4 * 4 / (16 * 16))
    angle, same = both("cosine")
    assert angle is not None
    assert angle == same
    assert -1 <= angle <= 1


def test_what_is_there_is_kept(folder: Path, subjects: list[LoadedModel]) -> None:
    before = (folder / "analysis.json").stat().st_mtime_ns
    assert analyze(FAST, subjects, folder) == read_analysis(folder)
    assert (folder / "analysis.json").stat().st_mtime_ns == before


def test_finished_patches_are_taken_and_a_lost_picture_is_drawn_again(
    folder: Path, subjects: list[LoadedModel], tmp_path: Path
) -> None:
    given = Gradients(patches=(str(patch_folder(folder)),), pixel=Fgsm(), images=9)
    found = analyze(given, subjects, tmp_path)
    assert not (tmp_path / "patches").exists()
    reports = (read_analysis(folder), found)
    cosine = [values(report, "cosine", region="patch", attack="lavan 4x4")[0].value for report in reports]
    assert cosine[0] == cosine[1]
    (tmp_path / "cosine.png").unlink()
    analyze(given, subjects, tmp_path)
    assert (tmp_path / "cosine.png").is_file()


def test_patches_of_another_precision_are_refused(folder: Path, tmp_path: Path) -> None:
    given = Gradients(patches=(str(patch_folder(folder)),), pixel=Fgsm(), images=3)
    with pytest.raises(UsageError, match=r"none of the patches in .*net0/lavan-.* was made at 4 bit.*--precision 4"):
        analyze(given, make_subjects(tmp_path, precisions=(4,)), tmp_path / "other")


def test_an_attack_without_a_patch_is_refused(subjects: list[LoadedModel], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="pgd makes no patch: choose an attack that does"):
        analyze(Gradients(attack=Pgd(steps=1)), subjects, tmp_path)


def test_without_training_images_patches_have_to_be_given(subjects: list[LoadedModel], tmp_path: Path) -> None:
    data = AnalysisData("shapes", shapes().test)
    with pytest.raises(UsageError, match=r"no training images to make patches on: .*patches="):
        analyze(FAST, subjects, tmp_path, data)


def test_an_analysis_needs_a_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="an analysis needs a model"):
        analyze(FAST, [], tmp_path)


def test_damaged_and_missing_and_newer_files_are_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no analysis at .*: make one with `qadtr-brevitas analyze`"):
        read_analysis(tmp_path)
    content = json.loads((folder / "analysis.json").read_text())
    for change, message in (({"schema_version": 99}, "schema version 99"), ({"records": 3}, "is damaged")):
        (tmp_path / "analysis.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(CheckpointError, match=message):
            read_analysis(tmp_path)
