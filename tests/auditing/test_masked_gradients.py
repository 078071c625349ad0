"""The audit must bite: networks that hide their gradients, draw at random or give probabilities."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qadtr_brevitas.data.split import Split
from qadtr_brevitas.quant import SwitchableModel, allowed_precisions, at_precision, calibrate, convert
from tests.auditing.conftest import CLASSES, SIDE, Trained, make_net, train

pytestmark = pytest.mark.slow

Logits = Callable[[Tensor], Tensor]


class Backward(torch.autograd.Function):
    """The identity, with noise as its gradient."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        return images.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.randn(grads[0].shape, generator=torch.Generator().manual_seed(0))


class Forward(torch.autograd.Function):
    """The identity, without a way back."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        return images.clone()


def rounding(images: Tensor) -> Tensor:
    """A quantizer of 6 bit without straight-through: its gradient is zero."""
    return (images * 63).round() / 63


@pytest.fixture(scope="session")
def switchable(trained: Trained) -> SwitchableModel:
    model = convert(trained.net, (32, 4, 2), mean=(0.0,) * 3, std=(1.0,) * 3, image_size=(SIDE, SIDE))
    calibrate(model, [trained.split.batch(torch.arange(100))[0]])
    return model.eval()


def statuses(findings: dict[str, Any]) -> dict[str, str]:
    return {id: finding.status for id, finding in findings.items()}


def test_a_huge_temperature_is_detected(trained: Trained) -> None:
    findings = trained.findings(lambda images: 1e4 * trained.net(images), "G5", "G8", "G12")
    assert statuses(findings) == {"G5": "WARN", "G8": "WARN", "G12": "WARN"}
    assert findings["G8"].numbers["images without gradient"] > 100
    assert findings["G12"].numbers["asr margin"] > findings["G12"].numbers["asr cross-entropy"] + 0.2
    assert "report the attack with that loss" in findings["G12"].meaning


@pytest.mark.parametrize(
    "hide",
    [rounding, torch.Tensor.detach, Forward.apply],
    ids=["quantizer without straight-through", "detached", "no backward"],
)
def test_a_cut_backward_pass_is_detected(trained: Trained, hide: Logits) -> None:
    findings = trained.findings(lambda images: trained.net(hide(images)), "G1", "G2", "G3", "G5", "G7", "G8")
    assert findings["G8"].numbers["images without gradient"] == findings["G8"].numbers["images"] == 200
    assert {findings[id].status for id in ("G3", "G5", "G8")} == {"WARN"}
    assert "the attacker chooses every pixel" in findings["G3"].meaning
    # What never moved cannot have been moved far enough.
    assert {findings[id].status for id in ("G1", "G2")} == {"skipped"}


def test_misleading_gradients_are_detected_by_other_gradients(trained: Trained) -> None:
    def misleading(images: Tensor) -> Tensor:
        return trained.net(Backward.apply(images))

    findings = trained.findings(misleading, "G3", "G5", "G6", "G13", "G17", surrogates=[trained.net], twin=trained.net)
    assert {findings[id].status for id in ("G5", "G6", "G13")} == {"WARN"}
    assert "its gradients are masked" in findings["G13"].meaning


def test_probabilities_are_detected(trained: Trained) -> None:
    findings = trained.findings(nn.Sequential(trained.net, nn.Softmax(1)), "G11")
    assert findings["G11"].status == "WARN"
    assert "give the logits" in findings["G11"].meaning


def test_a_random_network_is_detected(trained: Trained) -> None:
    def noisy(images: Tensor) -> Tensor:
        return trained.net(images + 0.05 * torch.randn_like(images))

    findings = trained.findings(noisy, "G9", "G10")
    assert statuses(findings) == {"G9": "WARN", "G10": "WARN"}


def test_a_random_precision_is_detected(trained: Trained, switchable: SwitchableModel) -> None:
    draws = random.Random(0)

    def drawn(images: Tensor) -> Tensor:
        with at_precision(switchable, draws.choice(allowed_precisions(switchable))):
            return switchable(images)

    findings = trained.findings(drawn, "G9", "G10")
    assert statuses(findings) == {"G9": "WARN", "G10": "WARN"}
    assert "EOT" in findings["G9"].meaning
    assert "report the attack on the mean of many draws" in findings["G10"].meaning
    assert set(findings["G10"].numbers) >= {"asr one draw", "asr mean of 5 draws", "gain", "noise"}


def test_fixed_precisions_are_not_random(trained: Trained, switchable: SwitchableModel) -> None:
    findings = trained.findings(switchable, "G6", "G9", "G10", "G13", precisions=[4])
    assert statuses(findings) == dict.fromkeys(("G6", "G9", "G10", "G13"), "pass")
    assert set(findings["G6"].numbers) >= {"asr white-box", "asr from 32 bit", "asr from 2 bit"}
    assert "asr gradient of 32 bit" in findings["G13"].numbers


def test_a_network_that_is_blind_to_noise_is_detected_by_pictures(trained: Trained) -> None:
    def blind(images: Tensor) -> Tensor:
        """Wherever neighbors differ as much as in noise there is gray, and no gradient."""
        mean, square = (nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False) for x in (images, images**2))
        noisy = (square - mean**2).mean(1, keepdim=True) > 0.05
        return trained.net(torch.where(noisy, 0.5, images))

    findings = trained.findings(blind, "G19", "G20")
    assert findings["G19"].status == findings["G20"].status == "WARN"
    assert findings["G20"].numbers["gain"] > 0.05
    assert "patch-auto" in findings["G20"].meaning
    assert "report attacks with init=image" in findings["G19"].meaning
    assert findings["G19"].numbers["gain"] > 0.05
    assert trained.findings(trained.net, "G19")["G19"].status == "pass"


def test_a_network_that_only_one_corner_matters_to_is_detected_by_chosen_places(trained: Trained) -> None:
    class Corner(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return nn.functional.pad(images[:, :, :7, :7], (0, SIDE - 7, 0, SIDE - 7))

    # Of the 13x13 places of a patch of 4x4, those at 7x7 touch the corner.
    finding = trained.findings(train(nn.Sequential(Corner(), make_net())), "G22")["G22"]
    assert finding.status == "WARN"
    assert finding.numbers["asr random places, all checks"] < 0.45
    assert finding.numbers["asr chosen places"] > 0.9
    assert "report patch-auto" in finding.meaning


def test_where_all_places_are_alike_a_choice_gains_nothing() -> None:
    def brightness(images: Tensor) -> Tensor:
        return -100 * (images.mean((1, 2, 3))[:, None] - torch.linspace(0.1, 0.9, CLASSES)).abs()

    levels = torch.rand(200, generator=torch.Generator().manual_seed(0))
    images = (255 * levels).to(torch.uint8)[:, None, None, None].expand(-1, 3, SIDE, SIDE)
    split = Split(images, brightness(images / 255).argmax(1), tuple(map(str, range(CLASSES))))
    finding = Trained(nn.Identity(), split).findings(brightness, "G22")["G22"]
    assert finding.status == "pass"
    assert 0.1 < finding.numbers["asr random places, all checks"] == finding.numbers["asr chosen places"] < 0.9


def test_pgd_that_follows_misleading_gradients_is_detected_by_autoattack(trained: Trained) -> None:
    # PGD's cross-entropy saturates, and AutoAttack's ratio of margins does not.
    finding = trained.findings(lambda images: 1e4 * trained.net(images), "G21")["G21"]
    assert finding.status == "WARN"
    assert finding.numbers["asr pgd 20 steps"] < finding.numbers["asr pgd 20 steps and autoattack"] - 0.4
    assert "--attack autoattack" in finding.meaning
