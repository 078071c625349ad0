"""MagR: the largest weights of a channel become smaller, and outputs hardly change."""

import itertools

import pytest
import torch
from brevitas.graph.magr import _project_onto_l1_ball
from torch import Tensor, nn

from qadtr_brevitas.quant import SwitchableModel, at_precision, calibrate, convert, freeze
from qadtr_brevitas.quant.layers import SwitchableLayer, switchable_layers
from qadtr_brevitas.quant.magr import _shrunk, reduced
from qadtr_brevitas.quant.ptq import ptq_states
from qadtr_brevitas.quant.rounding import WeightRounding

RNG = torch.Generator().manual_seed(0)
# Few images of many correlated inputs, as the layers of networks have.
ROWS = torch.randn(40, 24, generator=RNG) @ torch.randn(24, 24, generator=RNG).cumsum(0)
MOMENTS = ROWS.T @ ROWS
WEIGHT = torch.randn(6, 24, generator=RNG)


def objective(found: Tensor, weight: Tensor, moments: Tensor, alpha: float) -> Tensor:
    change = found - weight
    curve = moments / torch.linalg.matrix_norm(moments, 2)
    shrinkage = alpha * weight.abs().amax(1)
    return ((change @ curve) * change).sum(1) / 2 + shrinkage * found.abs().amax(1)


def test_it_finds_the_least_of_all_weights_of_two_inputs() -> None:
    weight, moments = torch.tensor([[1.0, -0.3], [0.2, 0.9]]), torch.tensor([[2.0, 1.2], [1.2, 1.0]])
    grid = torch.linspace(-1.2, 1.2, 481)
    every = torch.tensor(list(itertools.product(grid.tolist(), repeat=2)))
    for row in weight.split(1):
        best = float(objective(every, row.expand_as(every), moments, 0.1).min())
        found = reduced(row, moments, alpha=0.1, steps=500)
        assert found.abs().amax() < row.abs().amax()
        assert best - 1e-3 < float(objective(found, row, moments, 0.1)) < best + 1e-4


@pytest.mark.parametrize("shrinkage", [0.1, 1.0, 1000.0])
def test_its_step_is_that_of_brevitas(shrinkage: float) -> None:
    theirs = WEIGHT - shrinkage * _project_onto_l1_ball(WEIGHT / shrinkage)
    torch.testing.assert_close(_shrunk(WEIGHT, torch.full((6, 1), shrinkage)), theirs, rtol=1e-4, atol=1e-5)


def test_the_largest_weights_fall_and_outputs_are_nearly_kept() -> None:
    found = reduced(WEIGHT, MOMENTS, alpha=0.001, steps=200)
    assert (found.abs().amax(1) < 0.9 * WEIGHT.abs().amax(1)).all()
    outputs = ROWS @ WEIGHT.T
    assert (ROWS @ found.T - outputs).norm() < 0.02 * outputs.norm()
    assert (objective(found, WEIGHT, MOMENTS, 0.001) < objective(WEIGHT, WEIGHT, MOMENTS, 0.001)).all()


def test_channels_of_zeros_and_inputs_of_zeros_stay() -> None:
    weight = WEIGHT.clone()
    weight[2] = 0
    assert not reduced(weight, MOMENTS, alpha=0.01, steps=20)[2].any()
    assert torch.equal(reduced(WEIGHT, torch.zeros(24, 24), alpha=0.01, steps=20), WEIGHT)


IMAGES = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> SwitchableModel:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 36, 5),
    )  # fmt: skip
    with torch.no_grad():
        net[2].weight[:, 0, 0, 0] *= 6
    return convert(net, [32, 4, 3], image_size=(8, 8), first_last="same", narrow_range=True).eval()


def thresholds(layers: dict[str, SwitchableLayer]) -> Tensor:
    return torch.cat([each.weight_quant.quantizer.thresholds["3"].detach().flatten() for each in layers.values()])


def logits(model: nn.Module, bits: int) -> Tensor:
    with at_precision(model, bits), torch.no_grad():
        return model(IMAGES)


def test_ranges_are_those_of_the_new_weights_and_no_float_weight_is_left_over(model: SwitchableModel) -> None:
    layers = switchable_layers(model)
    calibrate(model, IMAGES, method="minmax")
    before, wanted = thresholds(layers), logits(model, 32)
    calibrate(model, IMAGES, method="minmax", weights=["magr"])
    assert (thresholds(layers) <= before * 1.0001).all()
    assert thresholds(layers).sum() < 0.9 * before.sum()
    assert torch.equal(logits(model, 32), wanted)
    torch.testing.assert_close(freeze(model, 3)(IMAGES), logits(model, 3))
    assert all(state.wanted is None for state in ptq_states(model) if isinstance(state, WeightRounding))
    # Alone it rounds to the nearest levels of weights that the layers do not keep.
    assert any(state.offset(p) is not None for state in ptq_states(model) for p in model.switch.allowed[1:])  # pyright: ignore


@pytest.mark.parametrize("order", [["magr", "gptq"], ["gptq", "magr"]])
def test_with_gptq_it_starts_from_the_new_weights(model: SwitchableModel, order: list[str]) -> None:
    def error(methods: list[str]) -> float:
        calibrate(model, IMAGES, method="minmax", weights=methods)
        return float((logits(model, 3) - logits(model, 32)).square().mean())

    layers = switchable_layers(model)
    plain, wide = error(["gptq"]), thresholds(layers)
    both = error(order)
    # Ranges are MagR's, wherever it stands.
    assert thresholds(layers).sum() < 0.9 * wide.sum()
    assert both < error(["magr"])
    if order[0] == "magr":
        # Which of the two is better differs from processor to processor.
        assert both < 1.5 * plain
