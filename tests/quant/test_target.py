"""Networks converted for an FPGA compiler: integers are added to integers, and everything else stays as it was."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from qadtr_brevitas.errors import UsageError
from qadtr_brevitas.quant import SwitchableModel, at_precision, calibrate, convert, freeze
from qadtr_brevitas.quant.functions import QuantizedSum
from qadtr_brevitas.quant.quantizers import SwitchableQuant
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


def switchable(net: nn.Module, **settings: object) -> SwitchableModel:
    torch.manual_seed(0)
    model, _ = convert(randomize_norms(net).eval(), [32, 8, 4, 2], image_size=SIZE, **settings)
    calibrate(model, [IMAGES])
    return model


def watched_sums(model: nn.Module) -> list[tuple[Tensor, Tensor, float]]:
    """What is added wherever two activations are, and the step, in one forward."""
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


@pytest.mark.parametrize(
    ("name", "target"),
    [("own", "finn"), ("own", "hls4ml"), ("cifar_resnet8", "finn"), ("cifar_resnet8", "hls4ml"), ("resnet10t", "finn")],
)
def test_exact_at_32_bit_and_frozen_equal_below(name: str, target: str) -> None:
    net = randomize_norms(Net() if name == "own" else timm.create_model(name, num_classes=5)).eval()
    images = IMAGES if name != "resnet10t" else IMAGES.repeat(1, 1, 2, 2)[:2]
    model, _ = convert(net, [32, 4, 2], image_size=tuple(images.shape[2:]), target=target)
    calibrate(model, [images])
    with torch.no_grad():
        assert torch.equal(model(images), net((images - model.mean) / model.std))
        for bits in (4, 2):
            frozen = freeze(model, bits)
            with at_precision(model, bits):
                assert torch.equal(frozen(images), model(images))


def test_at_32_bit_it_trains_as_the_float_network_and_below_it_learns_its_thresholds() -> None:
    net = randomize_norms(Net())
    model, _ = convert(net, [32, 4], image_size=SIZE, target="finn")
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


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_steps_for_hls4ml_are_the_nearest_powers_of_two(bits: int) -> None:
    model, exact = switchable(Net(), target="hls4ml"), switchable(Net(), target="finn")
    for name, module in model.named_modules():
        if not isinstance(module, SwitchableQuant) or str(bits) not in module.thresholds:
            continue
        step, wanted = module.scale(bits).detach(), exact.get_submodule(name).scale(bits).detach()
        assert torch.equal(step.log2(), step.log2().round())
        if module.max_threshold is not None:
            assert module.threshold(bits) <= module.max_threshold
        elif step.shape == wanted.shape:
            assert ((step / wanted).log2().abs() <= 0.5 + 1e-6).all()
    head = model.net.head.weight_quant.quantizer
    assert head.shape == (1, 1)
    assert model.net.mix.weight_quant.quantizer.shape == (8, 1, 1, 1)


def test_the_gradient_of_a_step_that_is_a_power_of_two_reaches_the_threshold() -> None:
    model = switchable(Net(), target="hls4ml")
    with at_precision(model, 4):
        model(IMAGES).square().sum().backward()
    threshold = model.net.mix.weight_quant.quantizer.thresholds["4"]
    assert threshold.grad is not None
    assert threshold.grad.abs().sum() > 0


def test_a_network_that_multiplies_activations_is_refused() -> None:
    net = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=2)
    with pytest.raises(
        UsageError, match=r"finn computes .* only, and blocks\.0\.attn computes scaled_dot_.*convert it without target"
    ):
        convert(net, [32, 4], image_size=SIZE, target="finn")


@pytest.mark.parametrize(("setting", "value"), [("edge", "float"), ("activations", "dynamic")])
def test_floats_and_ranges_at_run_time_are_refused(setting: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"{setting}='{value}' is not possible with target='hls4ml'"):
        convert(Net(), [32, 4], image_size=SIZE, target="hls4ml", **{setting: value})
