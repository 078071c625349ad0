"""Every registered quantizer fulfills the contract and serves whole networks, at every granularity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.plugin import plugin
from qadtr_brevitas.core.registry import QUANTIZERS
from qadtr_brevitas.quant import SwitchableModel, at_precision, calibrate, convert, freeze, frozen_weights
from qadtr_brevitas.quant.log2 import Log2
from qadtr_brevitas.quant.quantizer import Levels, Quantizer
from qadtr_brevitas.quant.switchable_quant import SwitchableActQuant, SwitchablePixelQuant
from qadtr_brevitas.quant.uniform import PowerOfTwo, Uniform
from qadtr_brevitas.testing.quantizers import check_quantizer

IMAGES = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.act = nn.ReLU()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv(self.act(self.stem(x)))).mean((2, 3)))


def switchable(**settings: Any) -> SwitchableModel:
    model = convert(Small().eval(), [32, 8, 4], image_size=(8, 8), first_last="same", **settings)
    calibrate(model, [IMAGES])
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTIZERS.names())
def test_every_registered_quantizer_fulfills_the_contract(name: str) -> None:
    check_quantizer(QUANTIZERS.load(name)())


@plugin
class WithoutRounding(Uniform):
    def round(self, scaled: Tensor, levels: Levels, *, out: Tensor | None = None) -> Tensor:
        return scaled if out is None else out.copy_(scaled)


@plugin
class PastTheLimit(PowerOfTwo):
    def nearest_threshold(self, threshold: Tensor, levels: Levels, *, limit: float | None, above: bool) -> Tensor:
        return super().nearest_threshold(threshold, levels, limit=None, above=above)


@plugin
class PassingClippedGradients(Uniform):
    def quantize_weight(self, w: Tensor, scale: Tensor, levels: Levels) -> Tensor:
        return w + (super().quantize_weight(w, scale, levels) - w).detach() + 0 * scale


@plugin
class WithFixedStep(Uniform):
    def quantize_weight(self, w: Tensor, scale: Tensor, levels: Levels) -> Tensor:
        return super().quantize_weight(w, scale.detach(), levels)


@plugin
class WithoutSecondGradients(Uniform):
    """A quantizer whose step gradient is a constant to autograd."""

    def quantize_weight(self, w: Tensor, scale: Tensor, levels: Levels) -> Tensor:
        step = scale.detach()
        rounded = self.round(w.detach() / step, levels).to(w.dtype)
        passes = (w < levels[1] * step) & (w > levels[0] * step)
        return rounded * scale + passes * (w - w.detach() * (scale / step))


@plugin
class OneStepForAllImages(Uniform):
    def quantize_images(self, x: Tensor, scale: Tensor, levels: Levels, *, low: float, high: float) -> Tensor:
        return super().quantize_images(x, scale.mean().expand(len(scale)), levels, low=low, high=high)


@pytest.mark.parametrize(
    ("broken", "fact"),
    [
        (WithoutRounding, "levels do not fit into 2 bit"),
        (PastTheLimit, "limit 6.0"),
        (PassingClippedGradients, "quantize_weight passes gradients to clipped values"),
        (WithFixedStep, "the step gets no gradient through quantize_weight"),
        (WithoutSecondGradients, "second derivatives of quantize_weight"),
        (OneStepForAllImages, "each image with its own step"),
    ],
)
def test_the_contract_names_what_a_quantizer_breaks(broken: type[Uniform], fact: str) -> None:
    with pytest.raises(AssertionError, match=fact):
        check_quantizer(broken())


def test_a_quantizer_needs_levels_and_rounding_only() -> None:
    assert Quantizer.__abstractmethods__ == {"levels", "steps_per_threshold", "reach", "round"}


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("name", [name for name, kind in QUANTIZERS.load_all().items() if kind.for_weights])
def test_weights_have_at_most_two_to_the_bits_levels_per_threshold(name: str, granularity: str) -> None:
    model = switchable(weight_quantizer={"name": name, "granularity": granularity, "group_size": 4})
    shape = {"tensor": (1, 1, 1, 1), "channel": (8, 1, 1, 1), "group": (8, 2, 1, 1, 1)}[granularity]
    conv = model.net.conv
    assert conv.weight_quant.quantizer.shape == shape
    with at_precision(model, 4):
        weight = conv.quant_weight().value
        rows = weight.unflatten(1, (2, 4)).flatten(2).flatten(0, 1) if granularity == "group" else weight.flatten(1)
        assert all(len(row.unique()) <= 16 for row in rows)
        inside, outside = model(IMAGES), None
        with frozen_weights(model):
            outside = model(IMAGES)
        assert torch.equal(inside, outside)
        model(IMAGES).square().sum().backward()
    assert all(p.grad is not None for p in (conv.weight, conv.weight_quant.quantizer.thresholds["4"]))


@pytest.mark.parametrize("name", QUANTIZERS.names())
def test_32_bit_stays_exact_and_8_bit_close(name: str) -> None:
    weights = name if QUANTIZERS.load(name).for_weights else "uniform"
    model, net = switchable(weight_quantizer=weights, act_quantizer=name), Small().eval()
    with torch.no_grad():
        expected = net(IMAGES)
        assert torch.equal(model(IMAGES), expected)
        with at_precision(model, 8):
            error = (model(IMAGES) - expected).abs().max() / expected.abs().max()
    # Powers of two are up to a third off, however many of them there are.
    assert error < (0.3 if name == "log2" else 0.05)


def test_smaller_groups_are_quantized_more_finely() -> None:
    errors = []
    for granularity in ("tensor", "channel", "group"):
        model = switchable(weight_quantizer={"name": "uniform", "granularity": granularity, "group_size": 2})
        weight = model.net.conv.weight
        with at_precision(model, 4), torch.no_grad():
            errors.append(float((model.net.conv.quant_weight().value - weight).square().mean()))
    assert errors[0] > errors[1] > errors[2]


def test_log2_levels_are_the_threshold_over_powers_of_two() -> None:
    values = torch.tensor([1.0, 0.7, 0.75, 0.5, 0.26, 0.1, 0.0, -0.3, 5.0])
    rounded = Log2().round(values, Log2().levels(3, signed=True, narrow_range=True))
    # Three magnitudes at 3 bit; the exponent is rounded, and what lies below the last range is 0.
    assert rounded.tolist() == [1.0, 0.5, 1.0, 0.5, 0.25, 0.0, 0.0, -0.25, 1.0]


def test_quantizers_that_brevitas_lacks_are_not_frozen() -> None:
    with pytest.raises(UsageError, match=r"Log2.*uniform"):
        freeze(switchable(weight_quantizer="log2"), 4)
    with pytest.raises(UsageError, match="channel"):
        freeze(switchable(weight_quantizer={"name": "uniform", "granularity": "group", "group_size": 4}), 4)


def test_power_of_two_is_frozen_exactly() -> None:
    model = switchable(weight_quantizer="power-of-two", act_quantizer="power-of-two")
    with torch.no_grad(), at_precision(model, 4):
        torch.testing.assert_close(freeze(model, 4)(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"weight_quantizer": "uniforn"}, ["uniforn", "uniform"]),
        ({"weight_quantizer": {"granularity": "channel"}}, ["no name", "log2"]),
        ({"weight_quantizer": {"name": "uniform", "granularity": "row"}}, ["row"]),
        ({"act_quantizer": {"name": "uniform", "granularity": "channel"}}, ["per tensor"]),
        ({"target": "hls4ml", "weight_quantizer": "uniform"}, ["hls4ml", "power-of-two"]),
        ({"target": "finn", "weight_quantizer": {"name": "uniform", "granularity": "group"}}, ["finn", "group"]),
        ({"target": "fimm"}, ["fimm", "finn"]),
    ],
)
def test_impossible_quantizers_are_refused(settings: dict[str, Any], facts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        switchable(**settings)
    assert all(fact in str(caught.value) for fact in facts), caught.value


@pytest.mark.parametrize("mean", [0.0, 0.5], ids=["unsigned", "signed"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("quantizer", ["uniform", "power-of-two", "log2"])
def test_white_and_black_pixels_have_a_gradient(quantizer: str, bits: int, mean: float) -> None:
    settings = {"mean": [mean] * 3, "std": [1 - mean] * 3, "act_quantizer": quantizer}
    model = convert(Small().eval(), [bits], image_size=(8, 8), first_last="same", **settings)
    ends = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    calibrate(model, [ends], method="minmax")
    images = ends.clone().requires_grad_()
    logits = model(images)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), images)
    # Some ReLUs are open, so that every pixel matters.
    assert (gradient != 0).flatten(1).any(1).all()
    with torch.no_grad():
        assert torch.equal(model(ends), logits)


def test_only_values_that_round_to_the_ends_have_a_gradient_there() -> None:
    model = convert(Small().eval(), [8], image_size=(8, 8), mean=[0.5] * 3, std=[0.5] * 3)
    calibrate(model, [torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])], method="minmax")
    first, *others = (module for module in model.modules() if isinstance(module, SwitchableActQuant))
    assert isinstance(first, SwitchablePixelQuant)
    assert not any(isinstance(other, SwitchablePixelQuant) for other in others)
    values = torch.tensor([-128.6, -128.4, -127.9, 0.0, 126.9, 127.4, 127.6]) * first.scale(8).detach()
    values.requires_grad_()
    (gradient,) = torch.autograd.grad(first.quantize(values).sum(), values)
    assert gradient.tolist() == [0, 1, 1, 1, 1, 1, 0]
