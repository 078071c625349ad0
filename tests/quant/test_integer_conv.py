"""Convolutions of integers: exact sums, and the numbers of the eager model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.functional import conv2d

from qadtr_brevitas.core.device import has_compiler
from qadtr_brevitas.models.create import create_float_model
from qadtr_brevitas.quant import SwitchableModel, at_precision, calibrate, convert, frozen_weights, integer_layers
from qadtr_brevitas.quant.compiled import compile_passes, repeating
from qadtr_brevitas.quant.integer_conv import integer_conv2d, sums_are_exact
from qadtr_brevitas.quant.layers import SwitchableConv2d, switchable_layers
from qadtr_brevitas.quant.prepared import prepare

needs_integers = pytest.mark.skipif(not sums_are_exact(), reason="this CPU has no exact convolutions of 8-bit integers")


def rand(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def make_model(name: str = "cifar_resnet8", **settings: Any) -> SwitchableModel:
    torch.manual_seed(0)
    model = convert(create_float_model(name, num_classes=3), [32, 8, 4, 2], image_size=(32, 32), **settings)
    calibrate(model, [rand(16, 3, 32, 32)])
    return model.eval()


def integers_at(model: SwitchableModel, precision: int) -> set[str]:
    """Names of the convolutions that are computed with integers."""
    names = {id(layer): name for name, layer in switchable_layers(model).items()}
    with at_precision(model, precision), frozen_weights(model):
        return {names[key] for key in prepare(model, rand(2, 3, 32, 32)).integers}


def convolutions(model: SwitchableModel) -> set[str]:
    return {name for name, layer in switchable_layers(model).items() if isinstance(layer, SwitchableConv2d)}


@needs_integers
@pytest.mark.parametrize("zero", [0, 128])
@pytest.mark.parametrize(
    ("groups", "stride", "padding", "dilation"), [(1, 1, 1, 1), (1, 2, 0, 1), (4, 1, 1, 2), (8, 2, 2, 1)]
)
def test_sums_are_exact(zero: int, groups: int, stride: int, padding: int, dilation: int) -> None:
    draws = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 256, (3, 8, 9, 11), generator=draws, dtype=torch.uint8)
    weight = torch.randint(-128, 128, (16, 8 // groups, 3, 3), generator=draws, dtype=torch.int8)
    pairs = [[stride] * 2, [padding] * 2, [dilation] * 2]
    sums = integer_conv2d(codes, weight, zero, *pairs, groups)
    exact = conv2d(codes.double() - zero, weight.double(), None, stride, padding, dilation, groups)
    assert torch.equal(sums, exact.float())


@needs_integers
def test_every_convolution_of_a_resnet_is_one_of_integers_below_32_bit() -> None:
    model = make_model()
    assert all(integers_at(model, bits) == convolutions(model) for bits in (8, 4, 2))
    assert integers_at(model, 32) == set()


@needs_integers
def test_a_convolution_whose_input_is_not_quantized_stays_one_of_floats() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x).relu()).mean((2, 3)))

    torch.manual_seed(0)
    model = convert(Pooled(), [32, 4], image_size=(32, 32)).eval()
    calibrate(model, [rand(16, 3, 32, 32)])
    assert integers_at(model, 4) == {"net.first", "net.second"}
    second = dict(switchable_layers(model))["net.second"]
    second.input_quant.disable_quant = True
    assert integers_at(model, 4) == {"net.first"}


@needs_integers
def test_a_convolution_whose_input_was_changed_after_it_was_quantized_stays_one_of_floats() -> None:
    class Changed(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by, self.relu, self.conv, self.head = by, nn.ReLU(), nn.Conv2d(3, 8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(x)
            return self.head(self.conv(x.add_(self.by) if self.by else x).mean((2, 3)))

    found: list[set[str]] = []
    for by in (0.0, 0.1):
        model = convert(Changed(by), [32, 8], image_size=(32, 32), quantize_once=True).eval()
        calibrate(model, [rand(16, 3, 32, 32)])
        switchable_layers(model)["net.conv"].input_quant.disable_quant = True
        found.append(integers_at(model, 8))
    assert found == [{"net.conv"}, set()]


@needs_integers
@pytest.mark.parametrize("quantizer", [{"name": "log2"}, {"name": "uniform", "granularity": "group", "group_size": 4}])
def test_weights_that_are_no_integers_times_a_step_stay_floats(quantizer: dict[str, Any]) -> None:
    model = make_model(weight_quantizer=quantizer)
    kept = {name for name, layer in switchable_layers(model).items() if layer.weight_quant.quantizer.min_bits >= 8}
    assert integers_at(model, 4) <= kept


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar_resnet8", "mobilenetv3_small_050", "squeezenet1_1"])
def test_logits_are_those_of_the_eager_model(name: str) -> None:
    torch.compiler.reset()
    counters.clear()
    model, images, said = make_model(name), rand(8, 3, 32, 32), []
    compile_passes(model, report=said.append, backend="eager")
    for bits in (32, 8, 4):
        with torch.no_grad(), at_precision(model, bits), frozen_weights(model):
            eager = model(images)
            with repeating(model):
                ours = model(images)
                some = model(images[:3])
            assert torch.equal(model(images), eager)
        # A value on the border of two levels may fall to the other one.
        close = (ours - eager).abs().amax(1) <= 1e-4 * eager.abs().max()
        assert int(close.sum()) >= 6
        assert torch.allclose(some, ours[:3], atol=1e-4 * float(eager.abs().max())) or int(close.sum()) < 8
    assert not counters["graph_break"]
    assert [message.partition(" in ")[0] for message in said] == [
        "compiled the passes without gradients at 32 bit",
        "compiled the passes without gradients at 8 bit",
    ]


@pytest.mark.slow
@needs_integers
def test_changed_weights_are_seen_and_gradients_are_not_lost() -> None:
    torch.compiler.reset()
    model, images = make_model(), rand(4, 3, 32, 32)
    compile_passes(model, backend="eager")
    with at_precision(model, 4), frozen_weights(model), repeating(model):
        with torch.no_grad():
            before = model(images)
            next(iter(switchable_layers(model).values())).weight.mul_(-1)
            after = model(images)
        moving = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(moving).sum(), moving)
    assert not torch.allclose(before, after)
    assert float(gradient.abs().max()) > 0


def test_without_exact_sums_all_convolutions_are_those_of_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer_layers, "sums_are_exact", lambda: False)
    assert integers_at(make_model(), 4) == set()


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler("cpu"), reason="there is no C++ compiler")
def test_the_default_compiler_takes_integers() -> None:
    torch.compiler.reset()
    model, images, said = make_model(), rand(16, 3, 32, 32), []
    compile_passes(model, report=said.append)
    for bits in (4, 32):
        with torch.no_grad(), at_precision(model, bits), frozen_weights(model):
            eager = model(images)
            with repeating(model):
                ours = model(images)
        assert int(((ours - eager).abs().amax(1) <= 1e-4 * eager.abs().max()).sum()) >= 12
    assert all("compiled" in message for message in said)
