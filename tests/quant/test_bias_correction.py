"""Bias correction: outputs keep the means of the float network."""

from collections.abc import Generator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.quant import SwitchableModel, at_precision, calibrate, convert, freeze, recalibrate_norms
from qadtr_brevitas.quant.layers import SwitchableConv2d, SwitchableLinear
from tests.quant.conftest import SIZE, randomize_norms

pytestmark = pytest.mark.slow

BITS = (8, 4, 2)


class Mixed(nn.Module):
    """Convolutions with and without bias, a layer used twice, and a linear layer on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.twice = nn.Conv2d(6, 6, 3, padding=1)
        self.act = nn.ReLU()
        self.tokens = nn.Linear(6, 8)
        self.head = nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = self.twice(self.act(self.twice(x)))
        return self.head(self.act(self.tokens(x.flatten(2).transpose(1, 2))).mean(1))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return randomize_norms(Mixed()).eval()


@contextmanager
def outputs(model: nn.Module) -> Generator[dict[str, list[Tensor]]]:
    """Collect the mean output per channel of every call of every layer."""
    found: dict[str, list[Tensor]] = {}

    def note(name: str, y: Tensor) -> None:
        found.setdefault(name, []).append(y.mean((0, 2, 3) if y.dim() == 4 else tuple(range(y.dim() - 1))))

    handles = [
        module.register_forward_hook(lambda _, __, y, name=name: note(name, y))
        for name, module in model.named_modules()
        if isinstance(module, SwitchableConv2d | SwitchableLinear)
    ]
    yield found
    for handle in handles:
        handle.remove()


def shifts(model: SwitchableModel, images: Tensor, bits: int) -> dict[str, float]:
    """Return the distance of each layer's mean outputs, over all its calls, from those of the float network."""
    means = []
    for precision in (32, bits):
        with at_precision(model, precision), torch.no_grad(), outputs(model) as found:
            model(images)
        means.append({name: torch.stack(values).mean(0) for name, values in found.items()})
    exact, quantized = means
    return {name: (quantized[name] - exact[name]).norm().item() for name in exact}


@pytest.mark.parametrize("bits", BITS)
def test_means_are_those_of_the_float_network(model: SwitchableModel, images: Tensor, bits: int) -> None:
    calibrate(model, [images])
    before = shifts(model, images, bits)
    calibrate(model, [images], weights=["bias-correction"])
    after = shifts(model, images, bits)
    assert min(before.values()) > 0
    assert all(after[name] < 1e-3 * before[name] + 1e-5 for name in before)


@pytest.mark.parametrize("target", ["finn", "hls4ml"])
def test_means_are_right_in_blocks_that_quantize_sums(float_net: nn.Module, images: Tensor, target: str) -> None:
    model = convert(float_net, [32, *BITS], image_size=SIZE, target=target)
    calibrate(model, [images])
    before = {bits: shifts(model, images, bits) for bits in BITS}
    calibrate(model, [images], weights=["bias-correction"])
    for bits in BITS:
        after = shifts(model, images, bits)
        assert min(before[bits].values()) > 0
        assert all(after[name] < 1e-3 * before[bits][name] + 1e-5 for name in after)
    with torch.no_grad():
        assert torch.equal(model(images), float_net((images - model.mean) / model.std))


def test_layers_of_every_kind_are_corrected(net: nn.Module, images: Tensor) -> None:
    model = convert(net, [32, 4], image_size=SIZE)
    calibrate(model, [images])
    before = shifts(model, images, 4)
    calibrate(model, [images], weights=["bias-correction"])
    after = shifts(model, images, 4)
    assert before.keys() == {"net.stem", "net.twice", "net.tokens", "net.head"}
    # A layer that is used twice can only be right on the whole, and so what follows it.
    assert after["net.stem"] < 1e-5
    assert all(after[name] < 0.5 * before[name] for name in before)


def test_corrections_over_several_batches_are_close(model: SwitchableModel) -> None:
    images = torch.rand(24, 3, *SIZE, generator=torch.Generator().manual_seed(3))
    calibrate(model, images.split(8))
    before = shifts(model, images, 4)
    calibrate(model, images.split(8), weights=["bias-correction"])
    after = shifts(model, images, 4)
    assert after["net.conv1"] < 1e-4
    assert sum(after.values()) < 0.2 * sum(before.values())


def test_a_small_last_batch_counts_by_its_images(net: nn.Module) -> None:
    model = convert(net, [32, 4], image_size=SIZE)
    images = torch.rand(9, 3, *SIZE, generator=torch.Generator().manual_seed(3))
    calibrate(model, images.split(8), weights=["bias-correction"])
    assert shifts(model, images, 4)["net.stem"] < 1e-5


def test_float_stays_exact_and_other_precisions_are_untouched(
    model: SwitchableModel, float_net: nn.Module, images: Tensor
) -> None:
    calibrate(model, [images], weights=["bias-correction"])
    with torch.no_grad():
        assert torch.equal(model(images), float_net((images - model.mean) / model.std))
    correction = model.net.layer1[0].conv1.bias_correction
    offsets = [correction.offset(Precision(bits, bits)) for bits in BITS]
    assert all(offset.shape == (16,) and offset.any() for offset in offsets)
    assert not torch.equal(offsets[1], offsets[2])


def test_without_bias_correction_the_state_dict_has_no_offsets(model: SwitchableModel) -> None:
    assert not [name for name in model.state_dict() if "bias_correction" in name]
    assert model.net.conv1.bias_correction is None


def test_saved_corrections_load_into_a_converted_model(
    model: SwitchableModel, float_net: nn.Module, images: Tensor
) -> None:
    calibrate(model, [images], weights=["bias-correction"])
    other = convert(float_net, image_size=SIZE, ptq=["bias-correction"])
    other.load_state_dict(model.state_dict())
    for bits in BITS:
        with at_precision(model, bits), at_precision(other, bits), torch.no_grad():
            assert torch.equal(model(images), other(images))


def test_calibrating_again_without_it_removes_it(model: SwitchableModel, images: Tensor) -> None:
    with at_precision(model, 4), torch.no_grad():
        calibrate(model, [images])
        expected = model(images)
        calibrate(model, [images], weights=["bias-correction"])
        assert not torch.equal(model(images), expected)
        calibrate(model, [images])
        assert torch.equal(model(images), expected)


@pytest.mark.parametrize("bits", [32, *BITS])
def test_freezing_makes_it_part_of_the_bias(net: nn.Module, images: Tensor, bits: int) -> None:
    model = convert(net, [32, *BITS], image_size=SIZE)
    calibrate(model, [images], weights=["bias-correction"])
    frozen = freeze(model, bits)
    with at_precision(model, bits), torch.no_grad():
        assert torch.equal(frozen(images), model(images))
    assert not [name for name in frozen.state_dict() if "bias_correction" in name]
    assert (frozen.net.stem.bias is None) == (bits == 32)


def test_norms_can_be_recalibrated_on_top(model: SwitchableModel, images: Tensor) -> None:
    calibrate(model, [images], weights=["bias-correction"])
    recalibrate_norms(model, [images], precisions=[2])
    with at_precision(model, 2), torch.no_grad():
        assert model(images).isfinite().all()
