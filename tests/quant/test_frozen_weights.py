"""Weights that are quantized once: right for every weight, in copies, and after inference mode."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.quant import (
    SwitchableModel,
    allowed_precisions,
    at_precision,
    calibrate,
    convert,
    folded_norms,
    frozen_weights,
    get_precision,
    set_precision,
)
from qadtr_brevitas.quant.switchable_quant import SwitchableWeightQuant

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))


class Mixer(nn.Module):
    """Computes the product of whatever weight it is given."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.conv2d(x, weight, padding=1)


class TwoWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(6, 3, 3, 3))
        self.second = nn.Parameter(torch.randn(6, 6, 3, 3))
        self.mix = Mixer()
        self.act = nn.ReLU()
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.mix(x, self.first))
        # One of them is computed in each forward.
        x = self.act(self.mix(x, self.second))
        return self.head(self.act(self.mix(x, 0.5 * self.second.flip(0))).mean((2, 3)))


@pytest.fixture
def two() -> SwitchableModel:
    torch.manual_seed(0)
    model = convert(TwoWeights().eval(), [32, 8, 4], image_size=(8, 8), per_channel=False, first_last="same").eval()
    calibrate(model, IMAGES)
    return model


def gradient(model: nn.Module) -> Tensor:
    x = IMAGES.clone().requires_grad_()
    return torch.autograd.grad(model(x).square().sum(), x)[0]


@pytest.mark.parametrize("bits", [8, 4])
def test_a_module_that_is_called_with_several_weights(two: SwitchableModel, bits: int) -> None:
    with at_precision(two, bits):
        expected, slope = two(IMAGES), gradient(two)
        with frozen_weights(two):
            for _ in range(2):
                assert torch.equal(two(IMAGES), expected)
                assert torch.equal(gradient(two), slope)


def test_each_weight_is_quantized_once(two: SwitchableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized: list[Tensor] = []
    plain = SwitchableWeightQuant._quantize

    def counting(self: SwitchableWeightQuant, w: Tensor, bits: int, offset: Tensor | None) -> Tensor:
        quantized.append(w)
        return plain(self, w, bits, offset)

    monkeypatch.setattr(SwitchableWeightQuant, "_quantize", counting)
    with frozen_weights(two), torch.no_grad():
        for bits in (4, 8, 4, 8):
            with at_precision(two, bits):
                two(IMAGES)
    # The head and three weights of the mixer, at two precisions.
    assert len(quantized) == 8


def test_what_is_changed_inside_is_quantized_anew(two: SwitchableModel) -> None:
    with at_precision(two, 4), torch.no_grad():
        with frozen_weights(two):
            before = two(IMAGES)
            two.net.head.weight.mul_(2)
            changed = two(IMAGES)
            two.net.head.weight_quant.quantizer.thresholds["4"].mul_(0.5)
            clipped = two(IMAGES)
        assert not torch.equal(before, changed)
        assert not torch.equal(changed, clipped)
        assert torch.equal(two(IMAGES), clipped)


def test_a_copy_made_inside_is_a_model_of_its_own(two: SwitchableModel) -> None:
    with at_precision(two, 4), frozen_weights(two):
        with torch.no_grad():
            two(IMAGES)
        copied = copy.deepcopy(two)
        assert not any(p.requires_grad for p in two.parameters())
    assert all(p.requires_grad for p in (*two.parameters(), *copied.parameters()))
    with at_precision(copied, 4), torch.no_grad():
        before = copied(IMAGES)
        copied.net.first.mul_(-1)
        assert not torch.equal(copied(IMAGES), before)
    copied(IMAGES).sum().backward()
    assert copied.net.first.grad is not None
    assert two.net.first.grad is None


def test_a_copy_made_while_norms_are_folded_is_not_folded() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    model = convert(net, [32, 4], image_size=(8, 8))
    with folded_norms(model, IMAGES):
        copied = copy.deepcopy(model)
        with torch.no_grad():
            copied.net[1].running_var.mul_(4)
            assert not torch.allclose(copied(IMAGES), model(IMAGES), atol=1e-3)


@pytest.mark.parametrize("folded", [False, True])
def test_gradients_after_inference_mode(two: SwitchableModel, folded: bool) -> None:
    with at_precision(two, 4), frozen_weights(two):
        expected = gradient(two)
    with at_precision(two, 4), frozen_weights(two):
        with torch.inference_mode():
            two(IMAGES)
        assert torch.equal(gradient(two), expected)
    if folded:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
        model = convert(net, [32, 4], image_size=(8, 8))
        with folded_norms(model, IMAGES), frozen_weights(model):
            with torch.inference_mode():
                model(IMAGES)
            assert gradient(model).isfinite().all()


def test_models_made_in_inference_mode_can_be_trained(two: SwitchableModel) -> None:
    torch.manual_seed(0)
    net = TwoWeights().eval()
    with torch.inference_mode():
        model = convert(net, [32, 4], image_size=(8, 8))
        calibrate(model, IMAGES, weights=["bias-correction"])
    with at_precision(model, 4):
        model(IMAGES).sum().backward()
    assert model.net.first.grad is not None


def test_threads_have_precisions_of_their_own(two: SwitchableModel) -> None:
    with torch.no_grad():
        expected = {}
        for bits in (32, 8, 4):
            with at_precision(two, bits):
                expected[bits] = two(IMAGES)
    wrong: list[int] = []
    barrier = threading.Barrier(3)

    def run(bits: int) -> None:
        barrier.wait()
        for _ in range(8):
            with torch.no_grad(), at_precision(two, bits):
                barrier.wait()
                if not torch.equal(two(IMAGES), expected[bits]):
                    wrong.append(bits)

    threads = [threading.Thread(target=run, args=(bits,)) for bits in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert get_precision(two) == Precision(32, 32)


def test_a_thread_follows_the_main_thread_until_it_switches_itself(two: SwitchableModel) -> None:
    found: list[str] = []

    def run() -> None:
        found.append(str(get_precision(two)))
        with at_precision(two, 4):
            found.append(str(get_precision(two)))
        found.append(str(get_precision(two)))
        set_precision(two, 4)
        found.append(str(get_precision(two)))

    with at_precision(two, 8):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert str(get_precision(two)) == "8"
    assert found == ["8", "4", "8", "4"]


def test_weights_stay_frozen_until_the_last_thread_leaves(two: SwitchableModel) -> None:
    inside, leave = threading.Event(), threading.Event()

    def run() -> None:
        with frozen_weights(two):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=run)
    with frozen_weights(two):
        thread.start()
        inside.wait(10)
    assert not two.net.first.requires_grad
    leave.set()
    thread.join()
    assert all(p.requires_grad for p in two.parameters())
    assert two.switch.frozen is None


class Ensemble(nn.Module):
    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([model(x) for model in self.models]).mean(0)


def test_a_container_of_several_models_switches_them_all(two: SwitchableModel) -> None:
    torch.manual_seed(1)
    other = convert(TwoWeights().eval(), [4, 32], image_size=(8, 8))
    calibrate(other, IMAGES)
    both = Ensemble(two, other)
    assert [str(p) for p in allowed_precisions(both)] == ["32", "4"]
    set_precision(both, 4)
    assert str(get_precision(both)) == str(get_precision(two)) == str(get_precision(other)) == "4"
    with torch.no_grad():
        expected = both(IMAGES)
        with at_precision(both, 32):
            assert not torch.equal(both(IMAGES), expected)
        with frozen_weights(both):
            assert torch.equal(both(IMAGES), expected)
            assert not any(p.requires_grad for p in both.parameters())
    assert all(p.requires_grad for p in both.parameters())
    with pytest.raises(UsageError, match=r"precision 8.*32"):
        set_precision(both, 8)
    assert str(get_precision(two)) == "4"
    set_precision(two, 32)
    with pytest.raises(UsageError, match="32, 4"):
        get_precision(both)
    with pytest.raises(UsageError, match="2 switchable models"):
        calibrate(both, IMAGES)
