from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from qadtr_brevitas.attacks.pixel import Fgsm, Pgd
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.quant import at_precision
from qadtr_brevitas.reproduce.analyses.document import read_analysis
from qadtr_brevitas.reproduce.analyses.gradients import Gradients, input_gradients
from tests.evaluation.models import make_switchable
from tests.reproduce.analyses.support import LAVAN, analyze, make_models, patch_folder, select, shapes

FAST = Gradients(attack=LAVAN, pixel=Pgd(steps=2), images=9)


@pytest.fixture(scope="module")
def folder(models: list[LoadedModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gradients")
    analyze(FAST, models, folder)
    return folder


@pytest.mark.slow
def test_gradients_are_those_of_the_loss_whatever_the_batch_size() -> None:
    model = make_switchable()
    images, labels = shapes(6).test.batch(torch.arange(6))
    four = Precision(4, 4)
    whole = input_gradients(model, four, images, labels, batch_size=6)
    torch.testing.assert_close(whole, input_gradients(model, four, images, labels, batch_size=2), rtol=1e-3, atol=1e-6)
    one = images[:1].clone().requires_grad_(True)
    with at_precision(model, four):
        torch.nn.functional.cross_entropy(model(one), labels[:1]).backward()
    torch.testing.assert_close(whole[:1], one.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_every_quantity_has_a_table_and_every_picture_is_drawn(folder: Path) -> None:
    report = read_analysis(folder)
    # Cosine, mse and relative mse: three regions of the patch, two of the pixel attack.
    assert len(report.records) == 3 * (3 + 2)
    for picture in report.pictures:
        with Image.open(folder / picture.file) as image:
            assert image.width > 500
    assert [table.title for table in report.tables] == [f"Gradients: {x}" for x in ("cosine", "mse", "relative mse")]


@pytest.mark.slow
def test_zeros_around_the_patch_keep_the_angle_and_make_the_mean_error_small(folder: Path) -> None:
    report = read_analysis(folder)

    def both(what: str) -> list[float | None]:
        regions = ("patch", "zeros around the patch")
        return [select(report, what, region=region, attack="lavan 4x4")[0].value for region in regions]

    patch, zeros = both("mse")
    assert patch
    assert zeros == pytest.approx(patch * 4 * 4 / (16 * 16))
    angle, same = both("cosine")
    assert angle is not None
    assert angle == same
    assert -1 <= angle <= 1


@pytest.mark.slow
def test_finished_patches_are_used_and_a_lost_picture_is_drawn_again(
    folder: Path, models: list[LoadedModel], tmp_path: Path
) -> None:
    given = Gradients(patches=(str(patch_folder(folder)),), pixel=Fgsm(), images=9)
    found = analyze(given, models, tmp_path)
    assert not (tmp_path / "patches").exists()
    reports = (read_analysis(folder), found)
    cosine = [select(report, "cosine", region="patch", attack="lavan 4x4")[0].value for report in reports]
    assert cosine[0] == cosine[1]
    (tmp_path / "cosine.png").unlink()
    analyze(given, models, tmp_path)
    assert (tmp_path / "cosine.png").is_file()


@pytest.mark.slow
def test_finished_patches_of_another_precision_are_refused(folder: Path, tmp_path: Path) -> None:
    given = Gradients(patches=(str(patch_folder(folder)),), pixel=Fgsm(), images=3)
    with pytest.raises(UsageError, match=r"net0/lavan-.* 4 bit.*--precision 4"):
        analyze(given, make_models(tmp_path, precisions=(4,)), tmp_path / "other")


def test_an_attack_that_makes_no_patch_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"'pgd' is not a PatchAttack.*attack=lavan"):
        Gradients(attack=Pgd(steps=1))  # pyright: ignore[reportArgumentType]
