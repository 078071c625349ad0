"""The defended classifier: the same answers as the definition, gradients through the masks, and its place in a grid."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qadtr_brevitas.api.models import convert
from qadtr_brevitas.core.errors import DataError, UsageError
from qadtr_brevitas.evaluation import NamedAttack, evaluate
from qadtr_brevitas.evaluation.certification import Certification
from qadtr_brevitas.evaluation.defended import DefendedModel, defended
from qadtr_brevitas.evaluation.defended_classifier import DefendedClassifier
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.evaluation.mask_fill import MaskFill
from qadtr_brevitas.evaluation.masks import covering_masks, mean_color
from qadtr_brevitas.evaluation.patch_cleanser import double_masking
from qadtr_brevitas.quant import frozen_weights, get_precision, set_precision
from qadtr_brevitas.quant.inference import logits_at
from tests.api.conftest import TinyNet, waves
from tests.evaluation.fakes import Reader, Whiten, coded_split, make_grid, reader, white_patch

AGAINST = Certification(2, 3)
MEAN = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    """A network of random weights on images of 16x16, at 32, 8 and 4 bit."""
    torch.manual_seed(0)
    model = convert(TinyNet(), precisions=[32, 8, 4], image_size=(16, 16)).eval()
    return LoadedModel.from_model(model)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return waves(12, seed=3)[0]


@pytest.mark.parametrize("method", ["double masking", "one round"])
def test_the_highest_output_is_the_defended_prediction(loaded: LoadedModel, images: Tensor, method: str) -> None:
    against = Certification(3, 3, method)  # pyright: ignore[reportArgumentType]
    network = DefendedModel(loaded.model, against, mean=loaded.info.mean)
    with torch.no_grad():
        assert network(images).argmax(dim=1).cpu().equal(network.decide(images).defended)


def test_gradients_are_those_of_the_mean_over_the_masks_at_the_precision_of_the_forward(
    loaded: LoadedModel, images: Tensor
) -> None:
    network = DefendedModel(loaded.model, AGAINST, mean=loaded.info.mean, batch_size=16)
    masks, fill = covering_masks((16, 16), 2, per_side=3), mean_color(loaded.info.mean)
    set_precision(loaded.model, 4)
    expected = images.clone().requires_grad_()
    logits = torch.stack([loaded.model(torch.where(mask, fill, expected)) for mask in masks]).mean(dim=0)
    logits[:, 1].sum().backward()
    set_precision(loaded.model, 32)
    found = images.clone().requires_grad_()
    with frozen_weights(network):
        output = logits_at(network, [next(p for p in loaded.model.switch.allowed if p.act == 4)])(found)  # pyright: ignore
        assert get_precision(network).is_float
        output[:, 1].sum().backward()
    assert found.grad is not None
    assert expected.grad is not None
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6)
    assert found.grad.abs().sum() > 0


def test_a_classifier_says_what_double_masking_says_and_leaves_the_network_as_it_was(
    loaded: LoadedModel, images: Tensor
) -> None:
    set_precision(loaded.model, 8)
    loaded.model.train()
    classifier = DefendedClassifier(loaded, 4, AGAINST)
    found = classifier(images)
    assert loaded.model.training
    assert str(get_precision(loaded.model)) == "8"
    loaded.model.eval()
    set_precision(loaded.model, 4)
    with torch.no_grad():
        fill = MaskFill(mean_color(loaded.info.mean))
        expected = double_masking(loaded.model, images, classifier.masks, fill=fill)
    assert found.classes.equal(expected.defended)
    assert found.certified.equal(expected.proved >= 0)
    assert classifier((images * 255).round().to(torch.uint8)).classes.equal(found.classes)
    quick = classifier(images, prove=False)
    assert quick.classes.equal(found.classes)
    assert not quick.certified.any()
    assert int(quick.passes.sum()) <= int(found.passes.sum())


def test_no_patch_changes_a_certified_answer(loaded: LoadedModel, images: Tensor) -> None:
    classifier = DefendedClassifier(loaded, 4, AGAINST)
    found = classifier(images)
    draw = torch.Generator().manual_seed(0)
    for image, label, certified in zip(images, found.classes, found.certified, strict=True):
        if certified:
            attacked = image.repeat(40, 1, 1, 1)
            for version in attacked:
                row, column = torch.randint(15, (2,), generator=draw).tolist()
                version[:, row : row + 2, column : column + 2] = torch.rand(3, 2, 2, generator=draw).round()
            assert (classifier(attacked, prove=False).classes == label).all()


def test_wrong_images_precisions_and_patches_are_refused(loaded: LoadedModel) -> None:
    classifier = DefendedClassifier(loaded, 4, AGAINST)
    for shape in ((2, 3, 8, 8), (3, 16, 16)):
        with pytest.raises(DataError, match=r"3, 16, 16"):
            classifier(torch.zeros(shape))
    with pytest.raises(UsageError, match="no precision 5"):
        DefendedClassifier(loaded, 5, AGAINST)
    with pytest.raises(UsageError, match="17x17 pixels does not fit on images of 16x16"):
        DefendedClassifier(loaded, 4, Certification(17))


@pytest.mark.slow
def test_patches_and_attacks_meet_the_defended_prediction_beside_the_undefended(tmp_path: Path) -> None:
    plain = reader(model=Reader(), fingerprint="weights")
    # White patches of 4x4 fool the reader, and a mask hides them wholly.
    behind = defended(plain, Certification(4, 3))
    patch = white_patch(side=4, model="reader", precision=4)
    grid = make_grid(
        [plain, behind], [patch], attacks=[NamedAttack("whiten", Whiten(side=4))], certifications=[Certification(4, 3)]
    )
    report = evaluate(grid, output=tmp_path)
    # Of the defended prediction nothing is proved once more.
    assert {cell.model for cell in report.certified} == {"reader"}
    names = [model.name for model in report.models]
    assert names == ["reader", "reader defended (4x4, double masking)"]
    assert len({model.fingerprint for model in report.models}) == 2
    rates = {(c.model, c.threat): c.asr.value for c in report.cells if c.precision == "4" and c.attack == "white"}
    assert rates[names[0], "transfer"] == 1
    # Two masks hide most of an image of 8x8, so that not all are saved.
    assert (rates[names[1], "transfer"] or 0) < 1
    own = [c for c in report.cells if c.threat == "white-box" and c.attack.startswith("whiten")]
    assert {cell.model for cell in own} == set(names)


def test_a_defended_model_of_other_masks_is_another_model() -> None:
    plain = reader()
    variants = [Certification(2, 3), Certification(3, 3), Certification(2, 2), Certification(2, 3, "one round")]
    assert len({defended(plain, against).fingerprint for against in variants} | {plain.fingerprint}) == 5
    assert coded_split().image_size == plain.info.image_size
