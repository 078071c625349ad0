"""Equalization: channels get similar ranges, and 32 bit computes the same, bit for bit."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.quant import SwitchableModel, at_precision, calibrate, convert, freeze
from qadtr_brevitas.quant.channel_sites import find_sites
from qadtr_brevitas.quant.equalize import Equalize

IMAGES = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Branches(nn.Module):
    """Channels of very different ranges: some that one layer reads, some that a sum reads too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.inner = nn.Conv2d(8, 6, 1)
        self.act2 = nn.ReLU()
        self.outer = nn.Conv2d(6, 8, 1)
        self.tokens = nn.LayerNorm(8)
        self.query, self.key, self.head = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 5)
        with torch.no_grad():
            self.norm.weight.copy_(torch.logspace(-2, 2, 8))
            self.tokens.weight.copy_(torch.logspace(-2, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.depthwise(self.act(self.norm(self.stem(x)))))
        x = x + self.outer(self.act2(self.inner(x)))
        tokens = self.tokens(x.flatten(2).transpose(1, 2))
        query, key = self.query(tokens), self.key(tokens)
        return self.head((torch.softmax(query @ key.mT, -1) @ x.flatten(2).mT).mean(1))


@pytest.fixture
def net() -> nn.Module:
    return Branches().eval()


@pytest.fixture
def model(net: nn.Module) -> SwitchableModel:
    return convert(net, [32, 4], image_size=(8, 8), first_last="same").eval()


def logits(model: nn.Module, bits: int) -> Tensor:
    with at_precision(model, bits), torch.no_grad():
        return model(IMAGES)


def test_channels_are_scaled_where_layers_alone_read_them(model: SwitchableModel) -> None:
    names = {module: name for name, module in model.net.named_modules()}
    found = [(names[site.maker], [names[reader] for reader in site.readers]) for site in find_sites(model, IMAGES[:2])]
    # The sum reads the output of the grouped convolution too.
    assert found == [
        ("norm", ["depthwise"]),
        ("depthwise", ["grouped"]),
        ("inner", ["outer"]),
        ("tokens", ["query", "key"]),
    ]


def test_32_bit_is_the_float_network_and_low_precisions_come_nearer(net: nn.Module, model: SwitchableModel) -> None:
    calibrate(model, IMAGES)
    before = (logits(model, 4) - logits(model, 32)).square().mean()
    calibrate(model, IMAGES, weights=["equalize"])
    with torch.no_grad():
        assert torch.equal(logits(model, 32), net(IMAGES))
        torch.testing.assert_close(freeze(model, 4)(IMAGES), logits(model, 4))
    assert not torch.equal(model.net.get_parameter("norm.weight"), net.get_parameter("norm.weight"))
    assert (logits(model, 4) - logits(model, 32)).square().mean() < before


def test_blocks_of_a_resnet_are_scaled_inside(float_net: nn.Module, images: Tensor) -> None:
    model = convert(float_net, [32, 4], image_size=(16, 16)).eval()
    sites = find_sites(model, images)
    # The first norm of each of nine blocks; a sum reads the second one.
    assert len(sites) == 9
    for site in sites:
        site.scale(torch.arange(site.channels) % 7 - 3)
    with torch.no_grad():
        assert torch.equal(model(images), float_net((images - model.mean) / model.std))


def test_ranges_of_activations_become_alike_but_for_the_rounding_of_factors(model: SwitchableModel) -> None:
    calibrate(model, IMAGES, weights=[Equalize(alpha=1.0)])
    seen: list[Tensor] = []
    handle = model.net.get_submodule("query").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model, 32)
    handle.remove()
    largest = seen[0].abs().amax((0, 1))
    assert largest.max() / largest.min() <= 2 * 1.001


def test_a_channel_that_is_always_zero_and_one_that_no_weight_reads_stay_as_they_are(net: nn.Module) -> None:
    with torch.no_grad():
        inner, outer = net.get_submodule("inner"), net.get_submodule("outer")
        assert isinstance(inner, nn.Conv2d)
        assert isinstance(outer, nn.Conv2d)
        assert inner.bias is not None
        inner.weight[1], inner.bias[1], outer.weight[:, 2] = 0, 0, 0
    model = convert(net, [32, 4], image_size=(8, 8)).eval()
    calibrate(model, IMAGES, weights=["equalize"])
    assert torch.equal(model.net.get_parameter("outer.weight")[:, 1], outer.weight[:, 1])
    assert torch.equal(model.net.get_parameter("inner.weight")[2], inner.weight[2])
    assert all(logits(model, bits).isfinite().all() for bits in (32, 4))


def test_calibrating_without_it_restores_the_weights(net: nn.Module, model: SwitchableModel) -> None:
    calibrate(model, IMAGES, weights=["equalize"])
    copied = deepcopy(model)
    calibrate(copied, IMAGES)
    for name, parameter in net.named_parameters():
        assert torch.equal(copied.net.get_parameter(name), parameter)
    assert not torch.equal(model.net.get_parameter("norm.weight"), net.get_parameter("norm.weight"))


class Clipped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.head = nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Conv2d(4, 5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.head(self.act(self.conv(x)))).flatten(1)


def test_a_network_without_channels_to_scale_is_refused() -> None:
    model = convert(Clipped().eval(), [32, 4], image_size=(8, 8))
    with pytest.raises(UsageError, match=r"equalize.*ReLU6.*gptq"):
        calibrate(model, IMAGES, weights=["equalize"])
