"""Sensitivities of layers, and bit-widths within a budget against brute force."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.quant import at_precision, calibrate, convert, get_precision
from qadtr_brevitas.quant.budget import Budget, Option, choose_bits
from qadtr_brevitas.quant.sensitivity import sensitivities

IMAGES = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))

OPTIONS = st.lists(
    st.builds(Option, bits=st.integers(2, 8), cost=st.integers(0, 40), error=st.integers(0, 50).map(lambda n: n / 8)),
    min_size=1,
    max_size=4,
    unique_by=lambda option: option.bits,
)


@settings(max_examples=100, deadline=None)
@given(layers=st.lists(OPTIONS, min_size=1, max_size=4), limit=st.integers(0, 120))
def test_the_search_is_as_good_as_brute_force(layers: Sequence[Sequence[Option]], limit: int) -> None:
    named = {f"layer{number}": options for number, options in enumerate(layers)}
    within = [each for each in product(*layers) if sum(option.cost for option in each) <= limit]
    found = choose_bits(named, limit)
    if not within:
        assert found is None
        return
    assert found is not None
    chosen = [next(o for o in named[name] if o.bits == bits) for name, bits in found.items()]
    assert sum(option.cost for option in chosen) <= limit
    assert sum(o.error for o in chosen) == min(sum(option.error for option in each) for each in within)


def test_large_networks_keep_the_budget() -> None:
    random = torch.Generator().manual_seed(0)
    numbers = torch.randint(1, 10**7, (40,), generator=random).tolist()
    layers: Mapping[str, Sequence[Option]] = {
        f"layer{number}": [Option(bits, count * bits // 8, count / 4**bits) for bits in (8, 5, 4, 3, 2)]
        for number, count in enumerate(numbers)
    }
    limit = sum(numbers) // 2
    found = choose_bits(layers, limit)
    assert found is not None
    spent = sum(count * bits // 8 for count, bits in zip(numbers, found.values(), strict=True))
    assert 0.99 * limit < spent <= limit


@pytest.mark.parametrize(
    ("text", "amount", "unit"), [("0.1MB", 1e5, "B"), ("80kB", 8e4, "B"), ("900B", 900, "B"), ("2.5Gbop", 2.5e9, "bop")]
)
def test_budgets(text: str, amount: float, unit: str) -> None:
    budget = Budget.parse(text)
    assert (budget.amount, budget.unit) == (pytest.approx(amount), unit)
    assert Budget.parse(budget.write(budget.amount)) == budget


@pytest.mark.parametrize("text", ["", "5", "MB", "-1MB", "0kB", "1.2.3kB", "1 MiB"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"0\.1MB"):
        Budget.parse(text)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.relu, self.fc = nn.ReLU(), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.relu(self.conv(x)).mean((2, 3)))


def test_sensitivities_are_those_of_one_layer_alone() -> None:
    torch.manual_seed(0)
    net = Net().eval()
    model = convert(net, [32, 8, 4, 2], image_size=(8, 8), first_last="same", residual="same", wide_head_input=False)
    calibrate(model.eval(), [IMAGES])
    found = {(one.layer, one.kind): one for one in sensitivities(model, [IMAGES[:3], IMAGES[3:]])}
    assert get_precision(model).is_float
    assert {layer for layer, kind in found if kind == "weights"} == {"conv.0", "conv.2", "conv.4", "fc"}
    # Known from outside: the float network with that weight quantized.
    layer = model.net.get_submodule("conv.2")
    with at_precision(model, 2), torch.no_grad():
        quantized = layer.weight_quant.quantize(layer.weight)
    with torch.no_grad():
        plain = net((IMAGES - model.mean) / model.std)
        net.conv[2].weight.copy_(quantized)
        changed = net((IMAGES - model.mean) / model.std)
    plain, changed = plain.double(), changed.double()
    expected = nn.functional.kl_div(changed.log_softmax(1), plain.softmax(1), reduction="batchmean")
    assert found["conv.2", "weights"].kl[2] == pytest.approx(float(expected), rel=1e-2)
    assert found["conv.2", "weights"].mse[2] == pytest.approx(float(((changed - plain) ** 2).mean()), rel=1e-3)
    for one in found.values():
        assert one.kl[2] > one.kl[8] > 0


def test_a_layer_without_weights_to_round_costs_nothing() -> None:
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        # Each weight is a level at every bit-width.
        net.conv[2].weight.copy_(net.conv[2].weight.sign())
    model = convert(net, [32, 8, 2], image_size=(8, 8))
    calibrate(model.eval(), [IMAGES], method="minmax")
    found = {(one.layer, one.kind): one for one in sensitivities(model, [IMAGES])}
    assert found["conv.2", "weights"].kl[2] == pytest.approx(0, abs=1e-12)
    # The first layer keeps 8 bit.
    assert found["conv.0", "weights"].kl[2] == found["conv.0", "weights"].kl[8]


def test_a_model_without_such_precisions_is_refused() -> None:
    model = convert(Net().eval(), [32, "w4a8"], image_size=(8, 8)).eval()
    with pytest.raises(UsageError, match=r"quant\.precisions"):
        sensitivities(model, [IMAGES])
