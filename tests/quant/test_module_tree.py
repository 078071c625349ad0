"""Modules that a network holds or changes in unusual ways: kept as they are, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.quant import SwitchableModel, at_precision, calibrate, convert, freeze
from qadtr_brevitas.quant.layers import SwitchableConv2d, SwitchableReLU

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))


class Twice(nn.Module):
    """Layers as attributes, and the same ones in a Sequential, which runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.act = nn.ReLU()
        self.second = nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4 * 16, 5)
        self.body = nn.Sequential(self.conv, self.act, self.second, self.act, nn.Flatten(), self.head)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5))
    return nn.Sequential(*layers).eval()


def converted(net: nn.Module, **settings: Any) -> SwitchableModel:
    model = convert(net, [32, 8, 2], image_size=(8, 8), **settings).eval()
    calibrate(model, IMAGES)
    with torch.no_grad():
        assert torch.equal(model(IMAGES), net(IMAGES))
    return model


def test_a_module_under_two_names_is_replaced_under_both() -> None:
    torch.manual_seed(0)
    model = converted(Twice().eval())
    assert isinstance(model.net.body[0], SwitchableConv2d)
    assert model.net.body[0] is model.net.conv
    assert model.net.body[1] is model.net.body[3] is model.net.act
    frozen = freeze(model, 2)
    with at_precision(model, 2), torch.no_grad():
        assert len(model.net.act(model.net.conv(IMAGES)).unique()) <= 256
        assert not torch.allclose(model(IMAGES), model.net.head(IMAGES.new_zeros(4, 64)))
        torch.testing.assert_close(frozen(IMAGES), model(IMAGES))
    assert all(not type(module).__name__.startswith("Switchable") for module in frozen.modules())


def test_one_relu_of_several_blocks_is_replaced_in_each() -> None:
    class Block(nn.Module):
        def __init__(self, act: nn.Module) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 3, 3, padding=1), act

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.conv(x))

    torch.manual_seed(0)
    act = nn.ReLU()
    model = converted(
        nn.Sequential(Block(act), Block(act), Block(act), nn.Flatten(), nn.Linear(192, 5)).eval(), first_last="same"
    )
    assert all(isinstance(model.net[index].act, SwitchableReLU) for index in range(3))
    with at_precision(model, 2), torch.no_grad():
        assert len(model.net[1](IMAGES).unique()) <= 4


def test_a_module_in_a_plain_list_is_refused_by_name() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(144, 5)
            self.layers = [self.conv]

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layers[0](x).flatten(1))

    with pytest.raises(UsageError, match=r"^conv .*ModuleList"):
        convert(Listed(), image_size=(8, 8))


def test_a_function_that_holds_a_module_is_refused_by_name() -> None:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(144, 5)
            self.run = lambda x: self.conv(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.run(x).flatten(1))

    with pytest.raises(UsageError, match=r"^conv "):
        convert(Called(), image_size=(8, 8))


def _own_forward(self: nn.Module, x: Tensor) -> Tensor:
    return 2 * type(self).forward(self, x)


@pytest.mark.parametrize("index", [0, 1, 5])
@pytest.mark.parametrize("bound", [True, False])
def test_a_forward_set_on_a_layer_is_refused_by_name(index: int, bound: bool) -> None:
    net = plain()
    layer, own = net[index], net[index].forward
    layer.forward = MethodType(_own_forward, layer) if bound else lambda x: 2 * own(x)
    with pytest.raises(UsageError, match=rf"^{index} \({type(layer).__name__}\).*forward"):
        convert(net, image_size=(8, 8))


def test_a_forward_that_a_module_chose_for_itself_is_kept() -> None:
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = plain()
            self.forward = self.doubled

        def doubled(self, x: Tensor) -> Tensor:
            return 2 * self.body(x)

    converted(Choosing().eval())


@pytest.mark.parametrize("index", [0, 1, 2, 5])
def test_forward_hooks_of_replaced_layers_are_kept(index: int) -> None:
    net = plain()
    seen: list[Tensor] = []
    net[index].register_forward_hook(lambda _, __, y: y * 2 - 0.5)
    net[index].register_forward_pre_hook(lambda _, args: (args[0] * 0.5,))
    net[index].register_forward_hook(lambda _, __, y: seen.append(y.detach()))
    model = converted(net)
    before = len(seen)
    with torch.no_grad(), at_precision(model, 8):
        near = model(IMAGES)
        torch.testing.assert_close(near, net(IMAGES), atol=0.05 * float(near.abs().max()), rtol=0)
        torch.testing.assert_close(freeze(model, 8)(IMAGES), near)
    assert len(seen) == before + 3


def test_a_relu_whose_output_a_hook_changes_is_not_taken_for_unsigned() -> None:
    net = plain()
    net[1].register_forward_hook(lambda _, __, y: y - 1)
    quantizer = converted(net).net[2].input_quant.quantizer
    assert quantizer.signed


def test_a_hook_that_computes_products_is_refused() -> None:
    net = plain()
    net[0].register_forward_hook(lambda _, __, y: y @ y.mT)
    with pytest.raises(UsageError, match=r"^0 has a hook.*matmul|^0 has a hook.*__matmul__"):
        convert(net, image_size=(8, 8))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "prune.remove"),
        (weight_norm, "remove_weight_norm"),
        (spectral_norm, "remove_spectral_norm"),
    ],
)
@pytest.mark.parametrize("index", [0, 5])
def test_a_weight_that_a_hook_makes_is_refused_with_what_to_type(
    make: Callable[[nn.Module], object], advice: str, index: int
) -> None:
    net = plain()
    make(net[index])
    with pytest.raises(UsageError, match=rf"weight of {index} .*hook.*{advice}"):
        convert(net, image_size=(8, 8))


@pytest.mark.parametrize("make", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_weights_are_quantized(make: Callable[[nn.Module], object]) -> None:
    net = plain()
    make(net[2])
    model = converted(net)
    assert model.report.quantized_macs == model.report.macs
    with torch.no_grad(), at_precision(model, 2):
        assert not torch.allclose(model(IMAGES), net(IMAGES))
        torch.testing.assert_close(freeze(model, 2)(IMAGES), model(IMAGES))


def test_a_pruned_network_is_converted_after_the_advice() -> None:
    net = plain()
    prune.l1_unstructured(net[0], "weight", 0.5)
    prune.remove(net[0], "weight")
    model = converted(net)
    with at_precision(model, 8):
        assert (model.net[0].quant_weight().value == 0).float().mean() >= 0.5


def test_a_module_that_works_in_place_and_whose_result_is_not_used_is_refused() -> None:
    class Forgetful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.head = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Linear(144, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            self.act(x)
            return self.head(x.flatten(1))

    with pytest.raises(UsageError, match=r"32 bit.*in place"):
        convert(Forgetful().eval(), image_size=(8, 8))


def test_random_networks_are_not_mistaken_for_wrong_ones() -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = plain()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x + torch.rand_like(x))

    assert convert(Random().eval(), image_size=(8, 8)).report.quantized_share == 1


def test_attention_below_a_module_with_constant_products_is_quantized() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Parameter(torch.rand(16, 2)), nn.Parameter(torch.rand(2, 8))
            self.attention = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x + self.left @ self.right)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.head = nn.Conv2d(3, 8, 2, 2), Block(), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(self.stem(x).flatten(2).mT).mean(1))

    torch.manual_seed(0)
    net = Net().eval()
    model = converted(net, first_last="float")
    with torch.no_grad(), at_precision(model, 2):
        assert not torch.allclose(model(IMAGES), net(IMAGES), atol=1e-4)


def test_parametrizations_stay_on_their_modules() -> None:
    net = plain()
    parametrizations.weight_norm(net[2])
    assert parametrize.is_parametrized(converted(net).net[2])
