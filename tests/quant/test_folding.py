"""Norms folded into convolutions: the same function for crafting, and nothing of it left afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.models.create import create_float_model
from qadtr_brevitas.quant import at_precision, calibrate, convert, folded_norms, frozen_weights
from qadtr_brevitas.quant.norm import norms
from qadtr_brevitas.quant.switch import switch_of

pytestmark = pytest.mark.slow

PRECISIONS = (32, 8, 4, 2)


def switchable(net: nn.Module, weights: Sequence[str] = ()) -> nn.Module:
    """Return a converted network in double precision, whose norms differ from each other and between precisions."""
    torch.manual_seed(0)
    model = convert(net.eval(), PRECISIONS)
    calibrate(model, [torch.rand(8, 3, 32, 32)], weights=weights)
    for norm in norms(model):
        for branch in (norm, *norm.branches.values()):
            branch.running_mean.normal_(0, 0.2)
            branch.running_var.uniform_(0.5, 1.5)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.2)
    # Floats of half the size would carry values over to the next level of a quantizer.
    return model.double().eval()


def logits_and_gradient(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    images = images.clone().requires_grad_()
    logits = model(images)
    (gradient,) = torch.autograd.grad(logits.square().sum(), images)
    return logits.detach(), gradient


class Branching(nn.Module):
    """A convolution whose output is also read outside its norm, and one whose output is changed in place before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.second, self.second_norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(4, 10)
        self.read_twice = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = y + self.first_norm(y) if self.read_twice else self.first_norm(y)
        return self.head(self.second_norm(self.relu(self.second(y))).mean((2, 3)))


class Rereading(nn.Module):
    """A ReLU whose input is read again afterwards, or is saved for the backward of another function."""

    def __init__(self, *, before: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.relu, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(4, 10)
        self.before = before

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        y = y.square() + self.relu(y) if self.before else self.relu(y) + y
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_vgg16", "test_efficientnet", "test_resnet", "densenet121"])
def test_folding_keeps_the_function_at_every_precision(name: str) -> None:
    model = switchable(create_float_model(name, num_classes=10))
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    for bits in PRECISIONS:
        with at_precision(model, bits), frozen_weights(model):
            logits, gradient = logits_and_gradient(model, images)
            with folded_norms(model, images[:2]):
                folded = logits_and_gradient(model, images)
            after = logits_and_gradient(model, images)
        assert torch.allclose(folded[0], logits, rtol=1e-8, atol=1e-10), bits
        assert torch.allclose(folded[1], gradient, rtol=1e-6, atol=1e-8 * gradient.abs().max()), bits
        assert torch.equal(after[0], logits)
        assert torch.equal(after[1], gradient)


def test_every_norm_after_a_convolution_is_folded() -> None:
    model = switchable(create_float_model("cifar_resnet20", num_classes=10))
    with frozen_weights(model), folded_norms(model, torch.rand(2, 3, 32, 32, dtype=torch.float64)):
        folding = switch_of(model).folding
        assert folding is not None
        assert folding.norms == set(norms(model))
        assert folding.in_place
    assert switch_of(model).folding is None


def test_corrected_biases_are_folded_too() -> None:
    model = switchable(create_float_model("cifar_resnet20", num_classes=10), weights=["bias-correction"])
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    with at_precision(model, 4), frozen_weights(model):
        expected = model(images)
        with folded_norms(model, images):
            assert torch.allclose(model(images), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("read_twice", [True, False])
def test_norms_whose_folding_changes_the_function_are_not_folded(read_twice: bool) -> None:
    net = Branching()
    net.read_twice = read_twice
    model = switchable(net)
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    with frozen_weights(model):
        expected = model(images)
        with folded_norms(model, images[:2]):
            assert torch.allclose(model(images), expected, rtol=1e-8)
            folding = switch_of(model).folding
            assert folding is not None
            assert len(folding.norms) == (0 if read_twice else 1)


@pytest.mark.parametrize("before", [True, False])
def test_relus_are_not_in_place_where_their_input_is_read_again(before: bool) -> None:
    model = switchable(Rereading(before=before))
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    with frozen_weights(model):
        logits, gradient = logits_and_gradient(model, images)
        with folded_norms(model, images[:2]):
            folded = logits_and_gradient(model, images)
            folding = switch_of(model).folding
            assert folding is not None
            assert folding.norms == set(norms(model))
            assert not folding.in_place
    assert torch.allclose(folded[0], logits, rtol=1e-8)
    assert torch.allclose(folded[1], gradient, rtol=1e-6, atol=1e-10)


class Jumpy(nn.Module):
    """A sum of fast waves, whose gradient changes its direction when inputs are rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((1000 * self.conv(x)).sin().mean((2, 3)))


@pytest.mark.parametrize(("name", "args"), [("cifar_resnet20", {}), ("test_vit", {"img_size": 32})])
def test_bfloat16_keeps_the_direction_at_32_bit_and_changes_nothing_below(name: str, args: dict[str, Any]) -> None:
    model = switchable(create_float_model(name, num_classes=10, args=args)).float()
    images = torch.rand(4, 3, 32, 32)
    for bits in PRECISIONS:
        with at_precision(model, bits), frozen_weights(model):
            with folded_norms(model, images[:2]):
                exact = logits_and_gradient(model, images)
            with folded_norms(model, images[:2], bf16=True) as folding:
                rounded = logits_and_gradient(model, images)
        assert folding.bf16
        assert all(tensor.dtype == torch.float32 for tensor in rounded)
        if bits == 32:
            assert not torch.equal(rounded[0], exact[0])
            assert torch.cosine_similarity(rounded[1].flatten(), exact[1].flatten(), dim=0) > 0.9
        else:
            assert torch.equal(rounded[0], exact[0])
            assert torch.equal(rounded[1], exact[1])


def test_bfloat16_is_not_used_where_it_changes_the_direction_of_the_gradient() -> None:
    model = switchable(Jumpy()).float()
    images = torch.rand(2, 3, 32, 32)
    with frozen_weights(model), folded_norms(model, images, bf16=True) as folding:
        assert not folding.bf16
        rounded = model(images)
        assert torch.allclose(rounded, Jumpy.forward(model.net, (images - model.mean) / model.std), rtol=1e-3)


def test_norms_in_training_are_refused() -> None:
    model = switchable(create_float_model("cifar_resnet20", num_classes=10)).train()
    with (
        pytest.raises(UsageError, match=r"eval\(\)"),
        folded_norms(model, torch.rand(2, 3, 8, 8)),
    ):
        pass


def test_a_nested_block_restores_the_outer_folding() -> None:
    model = switchable(create_float_model("cifar_resnet20", num_classes=10))
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    with frozen_weights(model), folded_norms(model, images):
        outer = switch_of(model).folding
        with folded_norms(model, images):
            assert switch_of(model).folding is not outer
        assert switch_of(model).folding is outer


def test_an_error_inside_ends_the_folding() -> None:
    model = switchable(create_float_model("cifar_resnet20", num_classes=10))
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    with pytest.raises(KeyError), frozen_weights(model), folded_norms(model, images):
        raise KeyError
    assert switch_of(model).folding is None
