"""Networks converted for an FPGA compiler: integers are added to integers, and everything else stays as it was."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.quant import (
    SwitchableModel,
    at_precision,
    calibrate,
    convert,
    folded_norms,
    freeze,
    frozen_weights,
)
from qadtr_brevitas.quant.products import QuantizedSum
from qadtr_brevitas.quant.range_methods import LevelGrid
from qadtr_brevitas.quant.switch import Switch, observing
from qadtr_brevitas.quant.switchable_quant import SwitchableActQuant, SwitchableQuant
from qadtr_brevitas.quant.uniform import PowerOfTwo
from tests.quant.conftest import randomize_norms

SIZE = (16, 16)
IMAGES = torch.rand(4, 3, *SIZE, generator=torch.Generator().manual_seed(5))


class Net(nn.Module):
    """ReLU6, a sum of a stream with itself, a sum in place that no ReLU follows, and one with a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.act = nn.ReLU6()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.offset = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.mix = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        y = self.norm(self.conv(x)) + self.offset
        y += x
        y = y + self.mix(y)
        return self.head(y.mean((2, 3)))


def switchable(net: nn.Module, *, method: str = "mse", **settings: object) -> SwitchableModel:
    torch.manual_seed(0)
    model = convert(randomize_norms(net).eval(), [32, 8, 4, 2], image_size=SIZE, **settings)
    calibrate(model, [IMAGES], method={"name": "percentile", "percentile": 99} if method == "percentile" else method)
    return model


def watched_sums(model: nn.Module) -> list[tuple[Tensor, Tensor, float]]:
    """Return both sides of each sum of activations in one forward, and its step."""
    found: list[tuple[Tensor, Tensor, float]] = []
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedSum) and module.operands:
            quant = module.operands["both"]
            quant.register_forward_hook(lambda _, __, y, name=name: seen.setdefault(name, []).append(y.detach()))
    with torch.no_grad():
        model(IMAGES)
    for name, (left, right) in seen.items():
        quantizer = model.get_submodule(name).operands["both"].act_quant.quantizer
        found.append((left, right, float(quantizer.scale(quantizer.bits).detach())))
    return found


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("residual", ["8bit", "same"])
def test_both_sides_of_a_sum_are_on_the_levels_of_one_signed_quantizer(bits: int, residual: str) -> None:
    model = switchable(Net(), target="finn", residual=residual)
    width = 8 if residual == "8bit" else bits
    with at_precision(model, bits):
        sums = watched_sums(model)
        assert len(sums) == 2
        for left, right, step in sums:
            for side in (left, right):
                levels = side / step
                assert (levels - levels.round()).abs().max() < 1e-4
                assert -(2 ** (width - 1)) <= levels.min().round()
                assert levels.max().round() <= 2 ** (width - 1) - 1
            # One side may be all 0, where the other is much larger and levels are few.
            assert (left + right).unique().numel() > 2


def test_without_a_target_no_sum_is_touched() -> None:
    assert not [module for module in switchable(Net()).modules() if isinstance(module, QuantizedSum)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target"),
    [("own", "finn"), ("own", "hls4ml"), ("cifar_resnet8", "finn"), ("cifar_resnet8", "hls4ml"), ("resnet10t", "finn")],
)
def test_exact_at_32_bit_and_frozen_equal_below(name: str, target: str) -> None:
    net = randomize_norms(Net() if name == "own" else timm.create_model(name, num_classes=5)).eval()
    images = IMAGES if name != "resnet10t" else IMAGES.repeat(1, 1, 2, 2)[:2]
    model = convert(net, [32, 4, 2], image_size=tuple(images.shape[2:]), target=target)
    calibrate(model, [images])
    with torch.no_grad():
        assert torch.equal(model(images), net((images - model.mean) / model.std))
        for bits in (4, 2):
            frozen = freeze(model, bits)
            with at_precision(model, bits):
                assert torch.equal(frozen(images), model(images))


def test_at_32_bit_it_trains_as_the_float_network_and_below_it_learns_its_thresholds() -> None:
    net = randomize_norms(Net())
    model = convert(net, [32, 4], image_size=SIZE, target="finn")
    twin = copy.deepcopy(net).train()
    model.train()
    model(IMAGES).square().sum().backward()
    twin((IMAGES - model.mean) / model.std).square().sum().backward()
    for name, parameter in twin.named_parameters():
        assert torch.equal(parameter.grad, model.net.get_parameter(name).grad), name
    model.zero_grad()
    calibrate(model, [IMAGES])
    with at_precision(model, 4):
        model(IMAGES).square().sum().backward()
    for module in model.modules():
        if isinstance(module, QuantizedSum) and module.operands:
            (threshold,) = module.operands["both"].parameters()
            assert threshold.grad is not None
            assert threshold.grad.isfinite()


def quantized_rows(model: nn.Module) -> dict[SwitchableQuant, Tensor]:
    """Return the values that each quantizer observes and does not clip by design, (thresholds, n)."""
    found: dict[SwitchableQuant, list[Tensor]] = {}

    def note(quantizer: SwitchableQuant, x: Tensor) -> None:
        allowed = x.detach().clamp(-math.inf if quantizer.signed else 0, quantizer.max_threshold)
        found.setdefault(quantizer, []).append(allowed.reshape(math.prod(quantizer.shape), -1))

    with observing(model, note):
        model(IMAGES)
    return {quantizer: torch.cat(rows, dim=1) for quantizer, rows in found.items()}


def steep() -> nn.Module:
    """Return the network with a ReLU6 whose values reach 6."""
    net = Net()
    with torch.no_grad():
        net.stem.weight *= 20
    return net


def squared_error(quantizer: SwitchableQuant, rows: Tensor, step: Tensor, bits: int) -> Tensor:
    levels = rows / step.view(-1, 1)
    return ((levels.round().clamp(*quantizer.levels(bits)) - levels) * step.view(-1, 1)).square().sum(1)


@pytest.mark.parametrize("method", ["mse", "minmax", "percentile"])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_calibration_stores_steps_for_hls4ml_as_they_are_used(method: str, bits: int) -> None:
    model = switchable(steep(), target="hls4ml", residual="same", method=method)
    held = [q for q in model.modules() if isinstance(q, SwitchableQuant) and str(bits) in q.thresholds]
    assert any(quantizer.max_threshold for quantizer in held)
    for quantizer in held:
        step = quantizer.scale(bits).detach()
        assert torch.equal(step.log2(), step.log2().round())
        assert torch.equal(quantizer.thresholds[str(bits)].detach(), quantizer.threshold(bits).detach())
        if quantizer.max_threshold is not None:
            assert quantizer.threshold(bits) <= quantizer.max_threshold
    assert model.net.head.weight_quant.quantizer.shape == (1, 1)
    assert model.net.mix.weight_quant.quantizer.shape == (8, 1, 1, 1)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_minmax_for_hls4ml_takes_the_smallest_steps_that_clip_nothing(bits: int) -> None:
    model = switchable(steep(), target="hls4ml", residual="same", method="minmax")
    for quantizer, rows in quantized_rows(model).items():
        if str(bits) not in quantizer.thresholds:
            continue
        reach = (quantizer.scale(bits) * quantizer.reach(bits)).detach().flatten()
        largest = rows.abs().amax(1)
        assert (reach < 2 * largest).all()
        if quantizer.max_threshold is None:
            assert (reach >= largest * (1 - 1e-5)).all()
        else:
            assert reach >= largest or quantizer.threshold(bits) * 2 > quantizer.max_threshold


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_percentiles_for_hls4ml_take_the_next_higher_steps(bits: int) -> None:
    model, exact = (switchable(Net(), target=target, method="percentile") for target in ("hls4ml", "finn"))
    compared = 0
    for name, module in model.named_modules():
        if not isinstance(module, SwitchableQuant) or str(bits) not in module.thresholds or module.max_threshold:
            continue
        step, wanted = module.scale(bits).detach(), exact.get_submodule(name).scale(bits).detach()
        if step.shape == wanted.shape:
            assert (step >= wanted * (1 - 1e-5)).all()
            assert (step < 2 * wanted).all()
            compared += 1
    assert compared >= 3


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_mse_for_hls4ml_takes_the_best_power_of_two(bits: int) -> None:
    model = switchable(steep(), target="hls4ml", residual="same")
    for quantizer, rows in quantized_rows(model).items():
        if str(bits) not in quantizer.thresholds:
            continue
        step = quantizer.scale(bits).detach().flatten()
        chosen = squared_error(quantizer, rows, step, bits)
        for factor in (0.25, 0.5, 2.0):
            if quantizer.max_threshold is None or quantizer.threshold(bits) * factor <= quantizer.max_threshold:
                # Of many values it has seen a sample.
                assert (chosen <= 1.02 * squared_error(quantizer, rows, step * factor, bits)).all()


@pytest.mark.parametrize("max_threshold", [None, 6.0])
def test_learned_steps_for_hls4ml_round_to_the_nearest_and_calibrated_ones_up(max_threshold: float | None) -> None:
    switch = Switch((Precision(4, 4),))
    quantizer = SwitchableActQuant(switch, (4,), 2, False, False, (4,), max_threshold, PowerOfTwo())
    # Of 15 steps; 1.4 and 1.5 lie on either side of the middle between 1 and 2, in log scale.
    wanted = torch.tensor([1.4, 1.5, 1.0, 1.0000001]) * 15 / 8
    with torch.no_grad():
        quantizer.thresholds["4"].copy_(wanted)
    assert (quantizer.scale(4) * 8).tolist() == [1, 2, 1, 1]
    grid = LevelGrid(quantizer.scheme, quantizer.levels(4), max_threshold)
    assert (grid.above(wanted) / 15 * 8).tolist() == [2, 2, 1, 1]
    above = grid.above(torch.tensor([5.0, 1e-9])) / 15
    assert above.tolist() == [0.5 if max_threshold is None else 0.25, 2.0**-33]


def test_the_gradient_of_a_step_that_is_a_power_of_two_reaches_the_threshold() -> None:
    model = switchable(Net(), target="hls4ml")
    with at_precision(model, 4):
        model(IMAGES).square().sum().backward()
    threshold = model.net.mix.weight_quant.quantizer.thresholds["4"]
    assert threshold.grad is not None
    assert threshold.grad.abs().sum() > 0


def test_a_network_that_multiplies_activations_is_refused() -> None:
    net = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=2)
    with pytest.raises(UsageError, match=r"finn.*blocks\.0\.attn.*scaled_dot_.*without target"):
        convert(net, [32, 4], image_size=SIZE, target="finn")


@pytest.mark.parametrize(("setting", "value"), [("first_last", "float"), ("activations", "dynamic")])
def test_floats_and_ranges_at_run_time_are_refused(setting: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"{setting}='{value}'.*'hls4ml'"):
        convert(Net(), [32, 4], image_size=SIZE, target="hls4ml", **{setting: value})


def test_what_quantizers_add_to_round_or_for_gradients_is_no_sum_of_the_network() -> None:
    model = switchable(Net(), target="finn", method="mse")
    calibrate(model, [IMAGES], weights=["gptq"])
    images = IMAGES.clone().requires_grad_()
    with at_precision(model, 4):
        logits = model(images)
        logits.sum().backward()
        frozen = freeze(model, 4)
    assert images.grad is not None
    assert images.grad.abs().max() > 0
    with torch.no_grad():
        assert torch.allclose(frozen(IMAGES), logits, atol=1e-4)


def test_what_folding_adds_to_biases_is_no_sum_of_the_network() -> None:
    model = switchable(Net(), target="finn").eval()
    images = IMAGES.clone().requires_grad_()
    with at_precision(model, 4), frozen_weights(model):
        wanted = model(IMAGES)
        with folded_norms(model, images):
            logits = model(images)
    assert torch.autograd.grad(logits.sum(), images)[0].abs().max() > 0
    torch.testing.assert_close(logits, wanted, rtol=0.05, atol=0.05 * float(wanted.abs().max()))
