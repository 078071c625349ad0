"""Dynamic quantization: a range for each image, measured when it runs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import parse_precisions
from qadtr_brevitas.quant import (
    SwitchableModel,
    at_precision,
    calibrate,
    convert,
    fake_quantize,
    frozen_weights,
    quantizer_parameters,
)
from qadtr_brevitas.quant.fake_quantize import quantize_images
from qadtr_brevitas.quant.switch import Switch
from qadtr_brevitas.quant.switchable_quant import SwitchableDynamicQuant
from qadtr_brevitas.quant.uniform import Uniform
from tests.quant.conftest import SIZE

BITS = (8, 5, 4, 2)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantizer(bits: int, *, images: int, signed: bool, max_threshold: float | None = None) -> SwitchableDynamicQuant:
    switch = Switch(parse_precisions([bits]))
    switch.images = images
    return SwitchableDynamicQuant(switch, (bits,), 2, signed, False, (), max_threshold, Uniform())


def reference(x: Tensor, bits: int, *, signed: bool) -> Tensor:
    """Quantize each image by itself, with the symmetric range of PyTorch's MinMaxObserver."""
    lo, hi = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    images = []
    for image in x:
        step = image.abs().max() / ((hi - lo) / 2) if signed else image.clamp_min(0).max() / hi
        images.append((image / step).round().clamp(lo, hi) * step)
    return torch.stack(images)


@pytest.fixture
def dynamic_model(float_net: nn.Module, images: Tensor) -> SwitchableModel:
    """Return ResNet-20 with dynamic activations, at 32 bit, in eval mode."""
    model = convert(float_net, image_size=SIZE, activations="dynamic")
    calibrate(model, [images[:1]])
    return model


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dynamic_quantization_equals_its_definition(bits: int, signed: bool, layout: torch.memory_format) -> None:
    x = (normal(3, 4, 5, 6) * torch.tensor([1.0, 0.01, 30.0]).view(3, 1, 1, 1)).contiguous(memory_format=layout)
    y = quantizer(bits, images=3, signed=signed).quantize(x)
    torch.testing.assert_close(y, reference(x, bits, signed=signed), rtol=1e-5, atol=1e-6)
    assert all(len(image.unique()) <= 2**bits for image in y)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_rounding_errors_are_at_most_half_a_step(bits: int, signed: bool) -> None:
    x = normal(2, 500) if signed else normal(2, 500).abs()
    quant = quantizer(bits, images=2, signed=signed)
    steps = quant.image_scales(x, bits)[:, None]
    assert ((quant.quantize(x) - x).abs() <= steps * 0.5001).all()


def test_parts_of_one_image_share_a_range() -> None:
    windows = normal(6, 7, 5) * torch.arange(1.0, 7.0).view(6, 1, 1)
    whole = quantizer(4, images=2, signed=True).quantize(windows)
    torch.testing.assert_close(whole.view(2, -1), reference(windows.view(2, -1), 4, signed=True))


def test_a_tensor_without_a_row_per_image_has_one_range() -> None:
    x = normal(5, 8)
    torch.testing.assert_close(
        quantizer(4, images=2, signed=True).quantize(x)[None], reference(x[None], 4, signed=True)
    )


def test_an_image_of_zeros_stays_zero() -> None:
    assert not quantizer(4, images=1, signed=True).quantize(torch.zeros(1, 9)).any()


def test_gradients_pass_straight_through_within_the_range() -> None:
    def gradient(x: Tensor, **settings: object) -> list[float]:
        x = x.clone().requires_grad_()
        (quantizer(3, images=2, **settings).quantize(x) * torch.arange(1.0, 7.0).view(2, 3)).sum().backward()
        return x.grad.flatten().tolist()

    x = torch.tensor([[-1.0, 0.2, 1.0], [-3.0, 2.0, 9.0]])
    assert gradient(x, signed=True) == [1, 2, 3, 4, 5, 6]
    assert gradient(x, signed=False) == [0, 2, 3, 0, 5, 6]
    assert gradient(x, signed=False, max_threshold=6.0) == [0, 2, 3, 0, 5, 0]


@pytest.mark.parametrize("change", ["small blocks", "no blocks"])
def test_all_memory_layouts_and_paths_agree(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def compute() -> tuple[Tensor, Tensor]:
        x = normal(40, 3, 5).requires_grad_()
        scale = x.detach().abs().amax((1, 2)) / 7
        y = quantize_images(x, scale, -8, 7, low=-1.0)
        y.square().sum().backward()
        return y.detach(), x.grad

    expected = compute()
    if change == "small blocks":
        monkeypatch.setattr(fake_quantize, "_PART", 50)
    else:
        monkeypatch.setattr(fake_quantize, "_is_blockable", lambda x: False)
    torch.testing.assert_close(compute(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, *BITS])
def test_a_prediction_does_not_depend_on_the_rest_of_the_batch(
    dynamic_model: SwitchableModel, images: Tensor, bits: int
) -> None:
    others = torch.cat((images[:1], torch.zeros(1, 3, *SIZE), images[:2].flip(0) ** 3))
    with at_precision(dynamic_model, bits), torch.no_grad():
        logits = dynamic_model(images)
        torch.testing.assert_close(logits[0], dynamic_model(others)[0], rtol=0, atol=0)
        assert not torch.equal(logits[1], dynamic_model(others)[1])


def test_a_network_is_close_to_float_at_8_bit_and_exact_at_32(
    dynamic_model: SwitchableModel, float_net: nn.Module, images: Tensor
) -> None:
    with torch.no_grad():
        exact = float_net((images - dynamic_model.mean) / dynamic_model.std)
        assert torch.equal(dynamic_model(images), exact)
        with at_precision(dynamic_model, 8):
            assert (dynamic_model(images) - exact).norm() < 0.05 * exact.norm()


@pytest.mark.slow
def test_only_weights_have_thresholds(dynamic_model: SwitchableModel, model: SwitchableModel) -> None:
    fixed, dynamic = (set(m.state_dict()) for m in (model, dynamic_model))
    assert dynamic < fixed
    assert all("act_quant" in name or "input_quant" in name for name in fixed - dynamic)
    assert len(quantizer_parameters(dynamic_model)) < len(quantizer_parameters(model))


def test_a_dynamic_network_trains_at_every_precision(dynamic_model: SwitchableModel, images: Tensor) -> None:
    dynamic_model.train()
    for bits in BITS:
        dynamic_model.zero_grad()
        with at_precision(dynamic_model, bits):
            F.cross_entropy(dynamic_model(images), torch.arange(4)).backward()
        gradient = dynamic_model.net.conv1.weight.grad
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


def test_frozen_weights_change_nothing(dynamic_model: SwitchableModel, images: Tensor) -> None:
    with at_precision(dynamic_model, 4), torch.no_grad():
        expected = dynamic_model(images)
        with frozen_weights(dynamic_model):
            assert torch.equal(dynamic_model(images), expected)


def test_a_dynamic_quantizer_has_no_threshold() -> None:
    with pytest.raises(UsageError, match=r"each image.*activations='static'"):
        quantizer(4, images=1, signed=True).threshold(4)


@pytest.mark.filterwarnings("ignore")  # PyTorch's own tools are deprecated there
def test_levels_agree_with_dynamic_quantization_of_pytorch() -> None:
    quantize_dynamic: Callable[..., nn.Module] = pytest.importorskip("torch.ao.quantization").quantize_dynamic
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 5)).eval()
    model = convert(net, [8], image_size=(4, 4), per_channel=False, activations="dynamic")
    images = torch.rand(20, 3, 4, 4)
    calibrate(model, [images], method="minmax")
    theirs = quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        ours, exact = (torch.cat([m(image[None]) for image in images]) for m in (model, net))
        reference_outputs = torch.cat([theirs(image[None]) for image in images])
    # Both round weights to 8 bit and activations to 7 or 8, with other offsets: equal up to what rounding can do.
    assert (ours - reference_outputs).abs().max() < 0.02 * exact.abs().max()
    assert (ours - reference_outputs).abs().max() > 0


class Arranged(nn.Module):
    """A network that arranges its activations in a way of its own before a layer."""

    def __init__(self, arrange: Callable[[Tensor], Tensor], restore: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.mix, self.head = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 6), nn.Linear(6, 5)
        self.arrange, self.restore = arrange, restore

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.arrange(self.stem(x).flatten(2).mT)
        return self.head(self.restore(F.gelu(self.mix(tokens))))


@pytest.mark.parametrize(
    ("arrange", "restore"),
    [
        (lambda x: x.transpose(0, 1), lambda x: x.mean(0)),
        (lambda x: torch.cat([x, -2 * x]), lambda x: sum(x.chunk(2)).mean(1)),
        (lambda x: x.permute(1, 0, 2).flatten(0, 1), lambda x: x.unflatten(0, (4, -1)).mean(0)),
    ],
)
def test_a_network_whose_first_dimension_is_not_the_images_is_refused_by_name(
    arrange: Callable[[Tensor], Tensor], restore: Callable[[Tensor], Tensor]
) -> None:
    with pytest.raises(UsageError, match=r"net\.mix.*activations='static'"):
        convert(Arranged(arrange, restore), image_size=(8, 8), activations="dynamic")
    convert(Arranged(arrange, restore), image_size=(8, 8))


def test_parts_of_one_image_after_the_other_are_allowed() -> None:
    net = Arranged(lambda x: x.flatten(0, 1), lambda x: x.unflatten(0, (-1, 4)).mean(1)).eval()
    model = convert(net, [32, 4], image_size=(8, 8), activations="dynamic")
    pixels = torch.rand(3, 3, 8, 8)
    calibrate(model, pixels)
    with at_precision(model, 4), torch.no_grad():
        torch.testing.assert_close(model(pixels)[:1], model(pixels[:1]))
