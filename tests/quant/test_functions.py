"""Products that modules compute themselves: the same at 32 bit, on quantized operands below."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.quant import (
    SwitchableModel,
    at_precision,
    calibrate,
    convert,
    freeze,
    frozen_weights,
    set_precision,
)
from qadtr_brevitas.quant.products import QuantizedAttention, QuantizedFunctions, QuantizedProduct

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


class Mixing(nn.Module):
    """A standardized convolution by hand, a borrowed weight, an einsum, attention, and a module within a module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.act = nn.ReLU()
        self.borrowed = nn.Linear(8, 24)
        self.inner = Inner()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.conv.weight - self.conv.weight.mean((1, 2, 3), keepdim=True)) * 2
        x = self.act(F.conv2d(x, weight)).flatten(2).mT
        q, k, v = F.linear(input=x, weight=self.borrowed.weight, bias=self.borrowed.bias).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v)
        return self.head(self.inner(x).mean(1))


class Inner(nn.Module):
    """A module with a layer, and an einsum after it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.mixer = nn.Parameter(torch.rand(8, 8, generator=torch.Generator().manual_seed(4)) - 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bnc,cd->bnd", self.layer(x), self.mixer)


@pytest.fixture
def pair() -> tuple[nn.Module, SwitchableModel]:
    torch.manual_seed(0)
    net = Mixing().eval()
    model = convert(net, image_size=(8, 8))
    calibrate(model, [IMAGES])
    return net, model


def test_every_product_is_in_the_report() -> None:
    report = convert(Mixing(), image_size=(8, 8)).report
    notes = {layer.name: layer.note for layer in report.layers if layer.quantized}
    assert notes == {
        "network": (
            "conv2d of unsigned input, weight per channel, at least 8 bit; "
            "linear of unsigned input, weight per channel; "
            "scaled_dot_product_attention of signed query, signed key, unsigned probabilities, signed value"
        ),
        "act": "unsigned, per tensor, residual stream, at least 8 bit",
        "inner.layer": "weights per channel, own signed input quantizer",
        "inner": "einsum of signed operand0, operand1 per tensor",
        "head": "weights per channel, own signed input quantizer, at least 8 bit",
        "conv": "its weight is quantized in the network itself",
        "borrowed": "its weight is quantized in the network itself",
    }
    assert report.quantized_macs == report.macs
    # 36 places: 8 * 27, 24 * 8, the attention's two, the layer and the einsum; and one head.
    assert report.macs == 36 * (8 * 27 + 24 * 8 + 2 * 36 * 8 + 64 + 64) + 5 * 8
    assert report.quantized_share == 1.0


def test_at_32_bit_it_is_the_float_network_and_trains_as_it(pair: tuple[nn.Module, SwitchableModel]) -> None:
    net, model = pair
    assert torch.equal(model(IMAGES), net(IMAGES))
    model(IMAGES).square().sum().backward()
    net(IMAGES).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter.grad, model.net.get_parameter(name).grad), name


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_operands_have_at_most_two_to_the_bits_levels(pair: tuple[nn.Module, SwitchableModel], bits: int) -> None:
    _, model = pair
    seen: list[tuple[str, str, int]] = []

    def look(product: QuantizedProduct, label: str) -> Any:
        return lambda _, __, y: seen.append((product.function, label, len(y.unique())))

    for module in model.modules():
        if isinstance(module, QuantizedProduct):
            for label, quantizer in module.operands.items():
                quantizer.register_forward_hook(look(module, label))
    with at_precision(model, bits), torch.no_grad():
        model(IMAGES)
    assert len(seen) == 2 + 2 + 4 + 2
    for function, label, levels in seen:
        per_channel = label == "weight"
        assert levels <= 2 ** (8 if function == "conv2d" else bits) * (24 if per_channel else 1), (function, label)
        assert levels > 1 or label == "probabilities"


@pytest.mark.parametrize("bits", [32, 8, 2])
def test_frozen_equals_the_switchable_one(pair: tuple[nn.Module, SwitchableModel], bits: int) -> None:
    _, model = pair
    frozen = freeze(model, bits)
    with at_precision(model, bits), torch.no_grad():
        assert torch.equal(frozen(IMAGES), model(IMAGES))
        assert torch.equal(copy.deepcopy(frozen)(IMAGES), model(IMAGES))
    # Below 32 bit the forward itself must still be handed quantized operands, by Brevitas's own modules.
    assert any(isinstance(module, QuantizedFunctions) for module in frozen.modules()) == (bits != 32)
    if bits == 32:
        assert type(frozen.net) is Mixing


def test_computed_weights_are_quantized_once_within_frozen_weights(pair: tuple[nn.Module, SwitchableModel]) -> None:
    _, model = pair
    set_precision(model, 4)
    with torch.no_grad():
        outside = model(IMAGES)
        with frozen_weights(model):
            assert torch.equal(model(IMAGES), outside)
            assert torch.equal(model(IMAGES), outside)


def test_parameters_and_thresholds_get_gradients_below_32_bit(pair: tuple[nn.Module, SwitchableModel]) -> None:
    _, model = pair
    model.train()
    with at_precision(model, 4):
        model(IMAGES).square().sum().backward()
    for name, parameter in model.named_parameters():
        if "thresholds" not in name or name.endswith(".4"):
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    assert model.net.conv.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": torch.rand(1, 1, 5, 5, generator=torch.Generator().manual_seed(5)) > 0.3},
        {"attn_mask": torch.randn(2, 1, 5, 5, generator=torch.Generator().manual_seed(6))},
        {"enable_gqa": True},
    ],
    ids=str,
)
def test_attention_without_quantizers_equals_that_of_torch(settings: dict[str, Any]) -> None:
    rng = torch.Generator().manual_seed(7)
    heads = 2 if settings.get("enable_gqa") else 4
    query = torch.randn(2, 4, 5, 8, generator=rng)
    key, value = (torch.randn(2, heads, 5, 8, generator=rng) for _ in range(2))
    attention = QuantizedAttention("scaled_dot_product_attention", {})
    found = attention(F.scaled_dot_product_attention, (query, key), {"value": value, **settings})
    torch.testing.assert_close(found, F.scaled_dot_product_attention(query, key, value, **settings))


def test_attention_drops_probabilities_in_training() -> None:
    torch.manual_seed(0)
    ones = torch.ones(1, 1, 50, 50)
    attention = QuantizedAttention("scaled_dot_product_attention", {})
    found = attention(F.scaled_dot_product_attention, (ones, ones, ones), {"dropout_p": 0.5})
    assert found.mean().item() == pytest.approx(1.0, abs=0.1)
    assert found.std() > 0.05


def test_a_product_that_was_absent_at_conversion_is_refused() -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            x = x.mean((2, 3)) @ self.weight
            return x @ self.weight if self.training else x

    model = convert(Moody().eval(), image_size=(8, 8))
    set_precision(model, 4)
    model(IMAGES)
    with pytest.raises(UsageError, match=r"matmul.*converted"):
        model.train()(IMAGES)


def test_a_module_with_other_products_in_each_call_is_refused() -> None:
    class Other(Inner):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x @ self.mixer if self.calls % 2 else torch.einsum("bnc,cd->bnd", x, self.mixer)

    class Turns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Other()

        def forward(self, x: Tensor) -> Tensor:
            x = F.pad(x.mean((2, 3)), (0, 5))[:, None]
            return self.inner(self.inner(x))

    with pytest.raises(UsageError, match=r"inner.*other products"):
        convert(Turns(), image_size=(8, 8))


def test_timm_attention_takes_the_fused_kernel_at_32_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    args = {"img_size": 32, "patch_size": 16, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 4}
    net = timm.create_model("vit_tiny_patch16_224", **args).eval()
    model = convert(net, image_size=(32, 32))
    calls: list[int] = []
    fused = F.scaled_dot_product_attention

    def count(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return fused(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", count)
    model(torch.rand(1, 3, 32, 32))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.ConvTranspose2d(3, 4, 2, stride=2), (2, 3, 8, 8)),
        (nn.Conv1d(8, 4, 3), (6, 8, 8)),
        (nn.Conv3d(1, 4, 3, padding=1), (2, 1, 3, 8, 8)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_layers_of_torch(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Unflatten(0, (2, 1)), nn.Flatten(0), nn.Unflatten(0, shape), layer, nn.Flatten(0))
    net = nn.Sequential(net, nn.Unflatten(0, (2, -1)), nn.LazyLinear(5))
    net(IMAGES)
    model = convert(net.eval(), image_size=(8, 8), first_last="same")
    report = model.report
    calibrate(model, [IMAGES])
    assert report.quantized_macs == report.macs
    with torch.no_grad():
        exact, outputs = net(IMAGES), {}
        for bits in (32, 8, 2):
            with at_precision(model, bits):
                outputs[bits] = model(IMAGES)
            assert torch.equal(freeze(model, bits)(IMAGES), outputs[bits])
    assert torch.equal(outputs[32], exact)
    near, coarse = ((outputs[bits] - exact).abs().max() / exact.abs().max() for bits in (8, 2))
    assert 0 < near < 0.05 < coarse
