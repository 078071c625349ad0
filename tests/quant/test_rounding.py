"""Levels of weights that PTQ methods choose: how they are kept."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.quant import SwitchableModel, at_precision, calibrate, convert, frozen_weights
from qadtr_brevitas.quant.gptq import Gptq
from qadtr_brevitas.quant.rounding import WeightRounding, pack, unpack


@given(st.data())
def test_packed_integers_come_back(data: st.DataObject) -> None:
    bits = data.draw(st.integers(1, 16))
    values = data.draw(st.lists(st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), max_size=40))
    packed = pack(torch.tensor(values, dtype=torch.int16), bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-len(values) * bits // 8)
    assert unpack(packed, bits, len(values)).tolist() == values


@pytest.fixture
def model() -> SwitchableModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    model = convert(net, [32, "w4a8", 4, 2], image_size=(8, 8), first_last="same").eval()
    calibrate(model, torch.rand(8, 3, 8, 8))
    Gptq().prepare(model)
    return model


def rounding(model: SwitchableModel) -> WeightRounding:
    return model.net[0].weight_quant.quantizer.rounding  # pyright: ignore


def weights(model: SwitchableModel, precision: str | int) -> torch.Tensor:
    conv = model.net[0]  # pyright: ignore
    with at_precision(model, precision), torch.no_grad():
        return conv.weight_quant.quantize(conv.weight)  # pyright: ignore


def test_offsets_move_weights_by_steps_at_one_precision_and_stay_within_the_levels(model: SwitchableModel) -> None:
    before = {p: weights(model, p) for p in (32, "w4a8", 4, 2)}
    offsets = torch.zeros(4, 3, 3, 3)
    offsets[1, 0, 0, 0], offsets[2] = 1, -20
    rounding(model).set(Precision(4, 4), offsets)
    quantizer = model.net[0].weight_quant.quantizer  # pyright: ignore
    step = quantizer.scale(4).detach()
    moved = (weights(model, 4) / step).round() - (before[4] / step).round()
    assert moved[1, 0, 0, 0] in (0, 1)  # 0 at the highest level
    assert torch.equal((weights(model, 4)[2] / step[2]).round(), torch.full((3, 3, 3), quantizer.levels(4)[0]))
    assert moved[0].abs().sum() == moved[3].abs().sum() == 0
    for other in (32, "w4a8", 2):
        assert torch.equal(weights(model, other), before[other])


def test_weights_kept_for_many_passes_follow_a_change_of_the_rounding(model: SwitchableModel) -> None:
    conv = model.net[0]  # pyright: ignore
    with frozen_weights(model), at_precision(model, 4):
        first = conv.weight_quant.quantize(conv.weight)  # pyright: ignore
        rounding(model).set(Precision(4, 4), torch.full((4, 3, 3, 3), -20))
        second = conv.weight_quant.quantize(conv.weight)  # pyright: ignore
    assert not torch.equal(first, second)


def test_weights_and_thresholds_learn_below_an_offset(model: SwitchableModel) -> None:
    rounding(model).set(Precision(4, 4), torch.ones(4, 3, 3, 3))
    with at_precision(model, 4):
        model(torch.rand(2, 3, 8, 8)).square().sum().backward()
    conv = model.net[0]  # pyright: ignore
    assert conv.weight.grad.abs().sum() > 0  # pyright: ignore
    assert conv.weight_quant.quantizer.thresholds["4"].grad.abs().sum() > 0  # pyright: ignore


def test_a_state_dict_holds_packed_offsets_and_refuses_those_of_another_layer(model: SwitchableModel) -> None:
    offsets = torch.randint(-3, 4, (4, 3, 3, 3), generator=torch.Generator().manual_seed(1))
    rounding(model).set(Precision(2, 2), offsets)
    state = model.state_dict()
    name = "net.0.weight_quant.tensor_quant.rounding.2"
    assert state[name].shape == (-(-108 * 3 // 8),)
    rounding(model).reset()
    model.load_state_dict(state)
    offset = rounding(model).offset(Precision(2, 2))
    assert offset is not None
    assert torch.equal(offset, offsets.short())
    with pytest.raises(RuntimeError, match=r"rounding\.2"):
        model.load_state_dict({**state, name: state[name][:-1]})
