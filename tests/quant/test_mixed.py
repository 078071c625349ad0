"""Mixed precisions: bit-widths per layer, which are switched, calibrated, saved and frozen like any precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import qadtr_brevitas as qb
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.layer_bits import LayerBits, MixedPrecision, parse_layers
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.models.create import create_float_model
from qadtr_brevitas.quant import SwitchableModel, at_precision, calibrate, convert, freeze
from qadtr_brevitas.quant.layers import switchable_layers
from qadtr_brevitas.quant.switchable_quant import SwitchableActQuant

IMAGES = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
EDGE = {"*": 4, "layer2.*": {"weight": 3, "activation": 6}, "layer3.0.conv1": {"weight": 8}}


def network() -> nn.Module:
    torch.manual_seed(0)
    return create_float_model("cifar_resnet8", num_classes=4).eval()


@pytest.fixture(scope="module")
def mixed() -> SwitchableModel:
    model = convert(network(), [32, 8, 4], image_size=(16, 16), layers={"edge": EDGE, "as4": {"*": 4}}).eval()
    calibrate(model, [IMAGES], weights=["gptq", "bias-correction"])
    return model


def logits(model: SwitchableModel, precision: object) -> torch.Tensor:
    with at_precision(model, precision), torch.no_grad():
        return model(IMAGES)


def test_each_layer_has_its_bits(mixed: SwitchableModel) -> None:
    layers = switchable_layers(mixed.net)
    with at_precision(mixed, "mixed:edge"):
        bits = {name: layer.weight_quant.quantizer.bits for name, layer in layers.items()}
        for name, layer in layers.items():
            levels = layer.weight_quant.quantize(layer.weight).detach().flatten(1)
            assert max(len(row.unique()) for row in levels) <= 2 ** bits[name]
        acts = {m.bits for n, m in mixed.net.named_modules() if isinstance(m, SwitchableActQuant) and "layer2" in n}
    # What first_last keeps at 8 bit stays there.
    assert bits["conv1"] == bits["linear"] == 8
    assert (bits["layer1.0.conv1"], bits["layer2.0.conv2"], bits["layer3.0.conv1"]) == (4, 3, 8)
    assert acts == {6, 8}


def test_the_others_are_what_they_are_without_it(mixed: SwitchableModel) -> None:
    plain = convert(network(), [32, 8, 4], image_size=(16, 16)).eval()
    calibrate(plain, [IMAGES], weights=["gptq", "bias-correction"])
    for precision in (32, 8, 4):
        assert torch.equal(logits(plain, precision), logits(mixed, precision))
    assert torch.equal(logits(mixed, "mixed:as4"), logits(mixed, 4))
    assert not torch.equal(logits(mixed, "mixed:edge"), logits(mixed, 4))


def test_it_freezes(mixed: SwitchableModel) -> None:
    frozen = freeze(mixed, "mixed:edge")
    assert torch.allclose(frozen(IMAGES), logits(mixed, "mixed:edge"), atol=1e-5)


def test_sizes_count_each_layer_at_its_bits(mixed: SwitchableModel) -> None:
    sizes = mixed.report.sizes
    assert sizes["mixed:as4"] == sizes["4"]
    weights = {name: layer.weight.numel() for name, layer in switchable_layers(mixed.net).items()}
    second = sum(count for name, count in weights.items() if name.startswith("layer2"))
    assert sizes["mixed:edge"] == sizes["4"] - second // 8 + weights["layer3.0.conv1"] // 2


def test_it_is_saved_and_loaded(mixed: SwitchableModel, tmp_path: Path) -> None:
    model = qb.convert(network(), [32, 4], image_size=(16, 16), architecture="cifar_resnet8", layers={"edge": EDGE})
    qb.calibrate(model.eval(), [IMAGES])
    qb.save(model, tmp_path / "model")
    loaded = qb.load(tmp_path / "model")
    assert [str(p) for p in qb.allowed_precisions(loaded)] == ["32", "4", "mixed:edge"]
    assert torch.equal(logits(loaded, "mixed:edge"), logits(model, "mixed:edge"))


def test_a_layer_may_stay_float() -> None:
    model = convert(network(), [32, 4], image_size=(16, 16), layers={"part": {"*": 32, "linear": {"weight": 4}}}).eval()
    calibrate(model, [IMAGES])
    with at_precision(model, 32):
        layer = switchable_layers(model.net)["linear"]
        weight = layer.weight.detach().clone()
    with at_precision(model, "mixed:part"):
        quantized = layer.weight_quant.quantize(weight).detach()
    assert not torch.equal(weight, quantized)
    layer.weight.data.copy_(quantized)
    # A zero does not move when it is quantized again.
    assert torch.allclose(logits(model, 32), logits(model, "mixed:part"), atol=1e-6)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"edge": {"*": 4, "layer9.*": 8}}, ("layer9", "layer3.0.act2")),
        ({"edge": {"*": 4, "layer2.0.conv7": {"weight": 8}}}, ("layer2.0.conv7", "layer2.0.conv1")),
        ({"edge": {"layer1.*": 4}}, ("conv1", "'*': 4")),
        ({"edge": {"*": 1}}, ("w1a1",)),
        ({"edge": {"*": {"wieght": 4}}}, ("wieght", "weight")),
        ({"Edge!": {"*": 4}}, ("Edge!",)),
    ],
)
def test_bad_patterns_are_refused(layers: dict[str, dict[str, object]], words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as raised:
        convert(network(), [32, 4], image_size=(16, 16), layers=layers)
    for word in words:
        assert word in str(raised.value)


def test_a_mixed_precision_without_bit_widths_is_refused() -> None:
    with pytest.raises(UsageError, match=r"mixed:edge.*layers"):
        convert(network(), [32, "mixed:edge"], image_size=(16, 16))


def test_precision_and_text_are_inverse() -> None:
    precision = Precision.parse("mixed:edge-2")
    assert precision == Precision.mixed("edge-2") != Precision.mixed("edge")
    assert str(precision) == "mixed:edge-2"
    assert not precision.is_float
    assert not precision.is_tied


def test_the_last_match_counts() -> None:
    mixed = MixedPrecision.make("a", {"*": "w4a8", "layer1.*": {"weight": 2}, "layer1.0.conv1": {"activation": 3}})
    assert (mixed.weight("conv1"), mixed.act("conv1")) == (4, 8)
    assert (mixed.weight("layer1.0.conv1"), mixed.act("layer1.0.conv1")) == (2, 3)


def test_layers_on_a_command_line(tmp_path: Path) -> None:
    found = parse_layers("edge:*=4, layer4.*=w8a4,fc=8")
    assert {key: LayerBits.parse(bits) for key, bits in found["edge"].items()} == {
        "*": LayerBits(4, 4),
        "layer4.*": LayerBits(8, 4),
        "fc": LayerBits(8, 8),
    }
    (tmp_path / "layers.json").write_text('{"edge": {"*": 4}}')
    assert parse_layers(str(tmp_path / "layers.json")) == {"edge": {"*": 4}}
    for text in ("edge", "edge:", "edge:*", ":*=4", str(tmp_path / "none.json")):
        with pytest.raises(UsageError, match="--layers"):
            parse_layers(text)
