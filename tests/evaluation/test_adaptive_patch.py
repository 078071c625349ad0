"""The adaptive attack: it breaks defended predictions of a trained network, and none that is certified."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qadtr_brevitas.api.models import convert
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.seeding import generator
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation import Grid, NamedAttack, evaluate
from qadtr_brevitas.evaluation.adaptive_attack import AdaptivePatch
from qadtr_brevitas.evaluation.adaptive_patch import adaptive_patches
from qadtr_brevitas.evaluation.certification import Certification
from qadtr_brevitas.evaluation.defended import DefendedModel, defended
from qadtr_brevitas.evaluation.defended_classifier import DefendedClassifier
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.quant import calibrate, frozen_weights, get_precision, set_precision
from tests.api.conftest import loader, net, waves

__all__ = ["net"]


@pytest.fixture(scope="module")
def loaded(net: nn.Module) -> LoadedModel:
    model = convert(net, precisions=[32, 4], image_size=(16, 16)).eval()
    calibrate(model, loader(128, seed=2))
    set_precision(model, 4)
    return LoadedModel.from_model(model.eval())


@pytest.mark.slow
def test_it_breaks_defended_predictions_and_no_certified_one(loaded: LoadedModel) -> None:
    images, labels = waves(24, seed=5)
    network = DefendedModel(loaded.model, Certification(4, 3), mean=loaded.info.mean).eval()
    with frozen_weights(network):
        with torch.no_grad():
            before = network.decide(images)
        made = adaptive_patches(network, images, labels, steps=20, generator=generator(0))
        again = adaptive_patches(network, images, labels, steps=20, generator=generator(0))
        with torch.no_grad():
            after = network.decide(made.images, prove=False).defended
    assert torch.equal(made.images, again.images)
    right = before.defended == labels
    broken = right & (after != labels)
    assert int(broken.sum()) > 0
    assert not broken[before.proved == labels].any()
    # Nothing differs from the image but one patch.
    for image, patched, (row, column) in zip(images, made.images, made.corners.tolist(), strict=True):
        changed = (image != patched).any(dim=0)
        changed[row : row + 4, column : column + 4] = False
        assert not changed.any()
    # A proved image has no place without a mask that stands.
    assert (made.standing[before.proved == labels] > 0).all()


@pytest.mark.slow
def test_starts_at_pictures_and_restarts_break_more_than_one_search_from_noise(loaded: LoadedModel) -> None:
    images, labels = waves(64, seed=5)
    network = DefendedModel(loaded.model, Certification(4, 3), mean=loaded.info.mean).eval()

    def broken(**settings: Any) -> int:
        made = adaptive_patches(network, images, labels, steps=20, generator=generator(0), **settings)
        with torch.no_grad():
            return int((network.decide(made.images, prove=False).defended != labels).sum())

    with frozen_weights(network):
        assert broken() > broken(init="uniform", restarts=1)
        # What one search breaks stays broken.
        assert broken(restarts=3) >= broken(restarts=2) >= broken(restarts=1) > 0


@pytest.mark.slow
def test_masks_that_overlap_prove_more_and_fewer_predictions_are_broken(loaded: LoadedModel) -> None:
    images, labels = waves(64, seed=5)
    proved, broken = list[int](), list[int]()
    for overlap in (1, 2):
        network = DefendedModel(loaded.model, Certification(4, 3, overlap=overlap), mean=loaded.info.mean).eval()
        with frozen_weights(network):
            made = adaptive_patches(network, images, labels, steps=20, generator=generator(0))
            with torch.no_grad():
                before, after = network.decide(images), network.decide(made.images, prove=False).defended
        wrong = (before.defended == labels) & (after != labels)
        assert not wrong[before.proved == labels].any()
        proved.append(int((before.proved == labels).sum()))
        broken.append(int(wrong.sum()))
    assert proved[1] > 2 * proved[0]
    assert broken[1] < broken[0]


def test_a_classifier_attacks_itself_at_its_own_precision(loaded: LoadedModel) -> None:
    images, labels = waves(8, seed=5)
    classifier = DefendedClassifier(loaded, 32, Certification(4, 3))
    first, second = (classifier.attack(images, labels, steps=3, restarts=1, seed=seed) for seed in (0, 1))
    assert str(get_precision(loaded.model)) == "4"
    assert not torch.equal(first.images, second.images)
    # The place does not depend on the seed.
    assert torch.equal(first.corners, second.corners)
    small = classifier.attack(images, labels, size=2, steps=1)
    assert int((small.images != images).any(dim=1).flatten(1).sum(dim=1).max()) <= 4


def test_it_is_an_attack_of_evaluate_on_the_defended_prediction(loaded: LoadedModel) -> None:
    images, labels = waves(8, seed=5)
    split = Split((images * 255).round().to(torch.uint8), labels, loaded.info.classes)
    behind = defended(loaded, Certification(4, 3))
    attack = NamedAttack.of(AdaptivePatch(steps=2, masks=1))
    settings: dict[str, Any] = {"patches": [], "split": split, "data_name": "waves", "attacks": [attack]}
    grid = Grid(loaded_models=[loaded, behind], precisions=[4], certifications=[Certification(4, 3)], **settings)
    # Made on the defended prediction only, and shown to both.
    assert [sourced.loaded.name for sourced, _ in grid.sourced_attacks] == [behind.name]
    report = evaluate(grid)
    assert {(cell.model, cell.threat) for cell in report.cells} == {
        (behind.name, "white-box"),
        (loaded.name, "transfer"),
    }
    # What is certified withstands the attack.
    (certified,) = report.certified
    robust = next(cell.robust_accuracy for cell in report.cells if cell.model == behind.name)
    assert certified.certified_accuracy.count <= robust.count
    assert str(get_precision(loaded.model)) == "4"
    with pytest.raises(UsageError, match=r"adaptive-patch.*--defend"):
        Grid(loaded_models=[loaded], **settings)


def test_one_round_has_no_second_masks(loaded: LoadedModel) -> None:
    network = DefendedModel(loaded.model, Certification(4, 3, "one round"), mean=loaded.info.mean)
    with pytest.raises(UsageError, match="one round"):
        adaptive_patches(network, *waves(2, seed=0), generator=generator(0))
