"""Conversion: exact at 32 bit, at most 2^b levels below, and nothing passed over in silence."""

import copy
from typing import Any

import pytest
import timm
import torch
from brevitas.nn import QuantConv2d, QuantLinear, QuantReLU
from brevitas.quant_tensor import IntQuantTensor
from torch import Tensor, nn

from qadtr_brevitas.core.precision import DEFAULT_BITS
from qadtr_brevitas.quant import SwitchableModel, at_precision, calibrate, convert, freeze, set_precision
from qadtr_brevitas.quant.proxies import SwitchableActProxy
from tests.quant.conftest import SIZE, randomize_norms


class Small(nn.Module):
    """Convolutions with a bias, ReLU6, a residual sum, max pooling, a functional ReLU, and no pretrained_cfg.

    The ReLU6 feeds the sum, by way of the pool.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.act = nn.ReLU6()
        self.pool = nn.MaxPool2d(2)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.mix = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act(self.stem(x)))
        x = self.mix(x + self.norm(self.conv(x)))
        return self.head(torch.relu(x).mean((2, 3)))


NETS = {
    "small": Small,
    "cifar_resnet20b": lambda: timm.create_model("cifar_resnet20b"),
    "cifar_vgg16": lambda: timm.create_model("cifar_vgg16"),
    "resnet18": lambda: timm.create_model("resnet18", num_classes=10),
}


@pytest.fixture(scope="module", params=NETS, ids=str)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, SwitchableModel, Tensor]:
    torch.manual_seed(0)
    net = randomize_norms(NETS[request.param]()).eval()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    model = convert(net, image_size=(32, 32))
    calibrate(model, [images])
    return net, model, images


def test_at_32_bit_it_is_the_float_network(pair: tuple[nn.Module, SwitchableModel, Tensor]) -> None:
    net, model, images = pair
    with torch.no_grad():
        assert torch.equal(model(images), net((images - model.mean) / model.std))


def test_at_32_bit_it_trains_as_the_float_network() -> None:
    torch.manual_seed(0)
    net = randomize_norms(timm.create_model("cifar_resnet20"))
    model = convert(net, image_size=SIZE)
    twin = copy.deepcopy(net)
    images = torch.rand(4, 3, *SIZE)
    model(images).square().sum().backward()
    twin((images - model.mean) / model.std).square().sum().backward()
    for name, parameter in twin.named_parameters():
        assert torch.equal(parameter.grad, model.net.get_parameter(name).grad), name
    for name, buffer in twin.named_buffers():
        if "num_batches" not in name:
            assert torch.equal(buffer, model.net.get_buffer(name)), name


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 5, 4, 2])
def test_every_quantized_tensor_has_at_most_two_to_the_bits_levels(
    pair: tuple[nn.Module, SwitchableModel, Tensor], bits: int
) -> None:
    _, model, images = pair
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantConv2d | QuantLinear)}
    names = list(layers)
    most = {name: 2 ** (8 if name in (names[0], names[-1]) else bits) for name in names}
    seen: list[str] = []

    def check_input(name: str, x: Tensor) -> None:
        seen.append(name)
        quant = layers[name].input_quant
        x = quant.quantize(x) if isinstance(quant, SwitchableActProxy) else x
        assert len(x.unique()) <= most[name], name

    def check_stream(y: Tensor) -> None:
        assert len(y.unique()) <= 2**8

    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: check_input(name, args[0]))
        for name, module in layers.items()
    ]
    handles += [
        module.register_forward_hook(lambda _, __, y: check_stream(y))
        for module in model.modules()
        if isinstance(module, QuantReLU)
    ]
    with at_precision(model, bits), torch.no_grad():
        model(images)
        for name, layer in layers.items():
            assert all(len(row.unique()) <= most[name] for row in layer.quant_weight().value.flatten(1)), name
    assert set(seen) == set(names)
    for handle in handles:
        handle.remove()


def test_quant_weight_is_a_valid_quant_tensor_at_every_precision(model: SwitchableModel) -> None:
    layer = model.net.layer1[0].conv1
    for bits in (8, 5, 4, 2):
        with at_precision(model, bits):
            weight = layer.quant_weight()
            assert isinstance(weight, IntQuantTensor)
            assert weight.is_valid
            assert weight.bit_width == bits
            assert torch.equal(weight.scale, layer.weight_quant.scale())
            assert weight.int().abs().max() <= 2 ** (bits - 1) - 1
    assert torch.equal(layer.quant_weight(), layer.weight)


@pytest.mark.parametrize("bits", [8, 2])
def test_brevitas_own_forward_computes_the_same(model: SwitchableModel, images: Tensor, bits: int) -> None:
    layer, x = model.net.layer1[0].conv2, torch.rand(2, 16, 8, 8)
    relu = model.net.layer1[0].act1
    with at_precision(model, bits), torch.no_grad():
        short = layer(relu(x))
        quantized = relu.act_quant(x)
        assert isinstance(quantized, IntQuantTensor)
        assert quantized.bit_width == bits
        torch.testing.assert_close(layer(quantized), short, rtol=0, atol=0)


def test_the_float_model_is_left_untouched(float_net: nn.Module) -> None:
    before = {key: value.clone() for key, value in float_net.state_dict().items()}
    kinds = [type(m) for m in float_net.modules()]
    convert(float_net, image_size=SIZE)
    assert [type(m) for m in float_net.modules()] == kinds
    assert all(torch.equal(value, before[key]) for key, value in float_net.state_dict().items())
    assert not float_net.training


def test_the_report_names_every_layer_that_runs() -> None:
    net = Small()
    report = convert(net, image_size=(16, 16)).report
    notes = {layer.name: (layer.quantized, layer.note) for layer in report.layers}
    assert notes == {
        "stem": (True, "weights per channel, own unsigned input quantizer, at least 8 bit"),
        "act": (True, "unsigned, per tensor, at most 6, residual stream, at least 8 bit"),
        "pool": (False, "stays float: passes values through"),
        "conv": (True, "weights per channel, own unsigned input quantizer"),
        "norm": (False, "float, statistics per precision"),
        "mix": (True, "weights per channel, own signed input quantizer"),
        "head": (True, "weights per channel, own unsigned input quantizer, at least 8 bit"),
    }
    assert 0.9 < report.quantized_share < 1
    assert report.to_dict()["layers"][0]["type"] == "Conv2d"


def test_relu6_never_passes_more_than_6() -> None:
    model = convert(Small(), image_size=(16, 16))
    with torch.no_grad():
        for threshold in model.net.act.act_quant.quantizer.parameters():
            threshold.fill_(100.0)
        for bits in DEFAULT_BITS:
            set_precision(model, bits)
            assert model.net.act(torch.tensor([7.0, 200.0])).max() == pytest.approx(6.0)


def streams(net: nn.Module, **settings: str) -> list[str]:
    report = convert(net, image_size=(32, 32), **settings).report
    return [layer.name for layer in report.layers if "residual stream" in layer.note]


@pytest.mark.slow
def test_residual_streams_are_found_through_pools_and_padded_shortcuts() -> None:
    blocks = [f"layer{stage}.{block}.act2" for stage in (1, 2, 3) for block in (0, 1, 2)]
    # The last block feeds the pool, and no sum.
    assert streams(timm.create_model("cifar_resnet20")) == ["act1", *blocks[:-1]]
    # Option B: a stage's last block feeds only convolutions, one of them in the next shortcut.
    assert streams(timm.create_model("cifar_resnet20b")) == ["act1", *(n for n in blocks if not n.endswith(".2.act2"))]
    assert "act1" in streams(timm.create_model("resnet18"))
    assert streams(timm.create_model("cifar_vgg16")) == []


def test_residual_streams_at_the_precision_of_the_rest() -> None:
    assert streams(timm.create_model("cifar_resnet20"), residual="same") == []
    model = convert(Small(), image_size=(16, 16), residual="same")
    report = model.report
    notes = {layer.name: layer.note for layer in report.layers}
    assert notes["act"] == "unsigned, per tensor, at most 6"
    assert notes["conv"] == "weights per channel"
    with at_precision(model, 2):
        assert len(model.net.act(torch.linspace(0, 6, 1000)).unique()) == 4


@pytest.mark.parametrize(("first_last", "first", "inner"), [("8bit", 8, 2), ("same", 2, 2), ("float", None, 2)])
def test_first_and_last_layers(first_last: str, first: int | None, inner: int) -> None:
    model = convert(Small(), image_size=(16, 16), first_last=first_last)
    report = model.report
    with at_precision(model, 2):
        for layer, bits in ((model.net.stem, first), (model.net.head, first), (model.net.conv, inner)):
            found = layer.quant_weight().bit_width if isinstance(layer, QuantConv2d | QuantLinear) else None
            assert found == bits
    assert [layer.name for layer in report.layers if "first_last=float" in layer.note] == (
        ["stem", "head"] if first is None else []
    )


class Classifier(nn.Module):
    """Ends as AlexNet and VGG do, and reads the last ReLU in another branch too."""

    def __init__(self, *, branch: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.hidden, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 16), nn.Linear(16, 5)
        self.act, self.last = nn.ReLU(), nn.ReLU()
        self.side = nn.Linear(16, 5) if branch else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.hidden(self.act(self.stem(x)).mean((2, 3))))
        return self.head(x) if self.side is None else self.side(x).relu() + self.head(x)


@pytest.mark.parametrize("branch", [False, True])
def test_the_input_of_the_last_layer_has_8_bit_too(branch: bool) -> None:
    pixels = torch.rand(64, 3, 6, 6)
    model = convert(Classifier(branch=branch), [32, 8, 2], image_size=(6, 6))
    calibrate(model, pixels)
    read: list[Tensor] = []
    model.net.head.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.no_grad(), at_precision(model, 2):
        model(pixels)
    assert len(read[0].unique()) > 16
    assert model.net.head.input_quant.is_quant_enabled is False
    notes = {layer.name: layer.note for layer in model.report.layers}
    assert "at least 8 bit" in notes["last"]
    assert "at least 8 bit" not in notes["act"]
    if branch:
        # A layer that is not the last reads it with 2 bit, of a quantizer of its own.
        assert model.net.side.input_quant.quantizer.min_bits == 2
    same = convert(Classifier(branch=branch), [32, 8, 2], image_size=(6, 6), first_last="same")
    older = convert(Classifier(branch=branch), [32, 8, 2], image_size=(6, 6), wide_head_input=False)
    assert same.net.last.act_quant.quantizer.min_bits == older.net.last.act_quant.quantizer.min_bits == 0
    assert (model.wide_head_input, older.wide_head_input) == (True, False)


def test_tiny_quantities_do_not_vanish() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 5))
    with torch.no_grad():
        net[0].weight.mul_(1e-9)
        net[2].weight.mul_(1e9)
    pixels = torch.rand(8, 3, 6, 6)
    for settings in ({}, {"activations": "dynamic"}, {"target": "hls4ml"}):
        model = convert(net.eval(), [32, 8], image_size=(6, 6), **settings)
        calibrate(model, pixels)
        with torch.no_grad(), at_precision(model, 8):
            quantized = model(pixels)
            torch.testing.assert_close(quantized, net(pixels), rtol=0, atol=0.1)
            assert not torch.allclose(quantized, net(pixels).mean(0, keepdim=True), atol=0.02)
            if "activations" not in settings:
                torch.testing.assert_close(freeze(model, 8)(pixels), quantized)


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, 4 + 8 + 5),
        ({"per_channel": False}, 3),
        ({"weight_quantizer": {"name": "uniform", "granularity": "group", "group_size": 2}}, 4 + 8 * 2 + 5 * 16),
        ({"target": "hls4ml"}, 4 + 8 + 1),
    ],
)
def test_sizes_count_one_scale_for_each_threshold(settings: dict[str, Any], scales: int) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(32, 5))
    sizes = convert(net, [32, 8], image_size=(6, 6), **settings).report.sizes
    weights, biases = 4 * 27 + 8 * 36 + 5 * 32, 4 + 8 + 5
    assert sizes == {"32": 4 * (weights + biases), "8": weights + 4 * biases + 4 * scales}


def test_independent_bit_widths_and_half_float_pairs(float_net: nn.Module, images: Tensor) -> None:
    model = convert(float_net, ["w4a8", "w4a32", "w32a8", 32], image_size=SIZE)
    calibrate(model, [images])
    layer, relu = model.net.layer1[0].conv1, model.net.act1
    with torch.no_grad():
        for precision, weight_levels, act_levels in (("w4a8", 15, 256), ("w4a32", 15, None), ("w32a8", None, 256)):
            set_precision(model, precision)
            model(images)
            levels = [
                len(row.unique()) for row in torch.as_tensor(layer.weight_quant.quantize(layer.weight)).flatten(1)
            ]
            assert max(levels) <= weight_levels if weight_levels else max(levels) == layer.weight[0].numel()
            values = len(relu(torch.randn(4, 16, 16, 16)).unique())
            assert values <= act_levels if act_levels else values > 1000


def test_narrow_range_is_ternary_at_2_bit_and_wide_range_has_four_levels() -> None:
    torch.manual_seed(0)
    for narrow, lowest in ((True, -1), (False, -2)):
        model = convert(Small(), image_size=(16, 16), narrow_range=narrow)
        with at_precision(model, 2), torch.no_grad():
            model.net.mix.weight_quant.quantizer.thresholds["2"].fill_(0.1)
            assert model.net.mix.quant_weight().int().min() == lowest


def test_per_tensor_weights_have_one_threshold() -> None:
    model = convert(Small(), image_size=(16, 16), per_channel=False)
    report = model.report
    assert model.net.mix.weight_quant.quantizer.thresholds["4"].shape == (1, 1, 1, 1)
    assert "weights per tensor, own unsigned input quantizer" in {layer.note for layer in report.layers}


def test_a_network_in_training_mode_is_converted_as_in_eval_mode() -> None:
    torch.manual_seed(0)
    net = randomize_norms(Small())
    before = {key: value.clone() for key, value in net.state_dict().items()}
    model = convert(net.train(), image_size=(16, 16))
    assert model.training
    assert model.net.norm.training
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert model.report == convert(net.eval(), image_size=(16, 16)).report
