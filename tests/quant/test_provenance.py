"""What is known of tensors: their origin, whether they are fixed, whether they can be negative."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qadtr_brevitas.quant.probe import probe
from qadtr_brevitas.quant.provenance import IMAGE


class Around(nn.Module):
    """Something between a ReLU and a matrix product with a parameter."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.act = nn.ReLU()
        self.other = nn.Parameter(torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) - 0.5)
        self.register_buffer("table", torch.eye(4))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return (self.between(self.act(self.stem(x))) @ self.other).flatten(1)


def operand(between: Callable[[Tensor], Tensor], **settings: Any) -> Any:
    found = probe(Around(between), torch.rand(2, 3, 4, 4), **settings)
    return found.products[-1].operands[0], found


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x,
        lambda x: x.flatten(2).reshape(2, 4, 4, 4),
        lambda x: F.pad(x, (1, 1, 1, 1))[..., 1:-1, 1:-1],
        lambda x: F.max_pool2d(x, 3, 1, 1),
        lambda x: x.transpose(1, 2).roll(1, 0).chunk(2, 1)[0],
        lambda x: F.dropout(x, 0.5, False),
    ],
)
def test_rearranged_values_keep_their_origin(between: Callable[[Tensor], Tensor]) -> None:
    found, known = operand(between)
    assert found.origin == "act"
    assert found.nonnegative
    assert not known.calls["act"].feeds_sum


@pytest.mark.parametrize(
    ("between", "nonnegative"),
    [
        (lambda x: x + 1, True),
        (lambda x: x - 1, False),
        (lambda x: x.add_(-1), False),
        (lambda x: x * x, True),
        (lambda x: x * -2, False),
        (lambda x: torch.cat([x, x], 1), True),
        (lambda x: torch.cat([x, -x], 1), False),
        (lambda x: F.gelu(x), False),
        (lambda x: (x - 1).sigmoid(), True),
        (lambda x: (x - 1).softmax(-1), True),
        (lambda x: F.layer_norm(x, (4,)), False),
    ],
)
def test_computed_values_lose_their_origin(between: Callable[[Tensor], Tensor], nonnegative: bool) -> None:
    found, known = operand(between)
    assert found.origin is None
    assert found.nonnegative == nonnegative
    assert known.calls["act"].feeds_sum


def test_pooled_values_lose_their_origin_but_are_no_stream() -> None:
    found, known = operand(lambda x: F.avg_pool2d(x, 3, 1, 1))
    assert found.origin is None
    assert found.nonnegative
    assert not known.calls["act"].feeds_sum


def test_a_tensor_that_is_written_to_loses_its_origin() -> None:
    def write(x: Tensor) -> Tensor:
        x[:, 0] = -1.0
        return x

    found, _ = operand(write)
    assert found.origin is None
    assert not found.nonnegative


def changed(change: Callable[[Tensor], object]) -> Callable[[Tensor], Tensor]:
    """Return a function that changes a tensor and returns the tensor, not the result of the change."""

    def between(x: Tensor) -> Tensor:
        change(x)
        return x

    return between


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.view(2, -1).sub_(1),
        lambda x: x.flatten(1).mul_(-1),
        lambda x: x[:, :2].sub_(1),
        lambda x: x.chunk(2, 1)[1].neg_(),
        lambda x: x.transpose(1, 2)[0].fill_(-1),
        lambda x: x.detach().sub_(1),
        lambda x: x.data.sub_(1),
        lambda x: x.view(-1).__setitem__(slice(0, 4), -1.0),
        lambda x: torch.sub(x, 1, out=x),
        lambda x: x.unbind(1)[0].copy_(-torch.ones(2, 4, 4)),
    ],
)
def test_a_change_through_a_view_is_seen(change: Callable[[Tensor], object]) -> None:
    found, _ = operand(changed(change))
    assert found.origin is None
    assert not found.nonnegative


@pytest.mark.parametrize(
    "change", [lambda x: x.view(-1).mul_(2), lambda x: x[:, 0].relu_(), lambda x: x.flatten().abs_()]
)
def test_a_change_that_keeps_the_sign_only_loses_the_origin(change: Callable[[Tensor], object]) -> None:
    found, _ = operand(changed(change))
    assert found.origin is None


def test_a_view_of_what_changes_is_seen_too() -> None:
    def between(x: Tensor) -> Tensor:
        view = x.flatten(2)
        x.sub_(1)
        return view.view(2, 4, 4, 4)

    found, _ = operand(between)
    assert (found.origin, found.nonnegative) == (None, False)


@pytest.mark.parametrize(
    ("between", "origin", "nonnegative"),
    [
        (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), None, False),
        (lambda x: F.interpolate(x, None, 2, "bicubic"), None, False),
        (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), None, True),
        (lambda x: F.interpolate(x, scale_factor=2), None, True),
        (lambda x: F.pad(x, (2, 2), value=-1.0), None, False),
        (lambda x: F.pad(x, (2, 2), "constant", 3.0), None, True),
        (lambda x: F.pad(x, (2, 2, 1, 1), mode="reflect"), "act", True),
        (lambda x: nn.ConstantPad2d((2, 2, 0, 0), -0.5)(x), None, False),
        (lambda x: nn.ZeroPad2d((2, 2, 0, 0))(x), "act", True),
        (lambda x: nn.Upsample(scale_factor=2, mode="bicubic")(x), None, False),
    ],
)
def test_resizing_and_padding(between: Callable[[Tensor], Tensor], origin: str | None, nonnegative: bool) -> None:
    found, _ = operand(lambda x: between(x)[..., :4, :4])
    assert (found.origin, found.nonnegative) == (origin, nonnegative)


def test_a_constant_that_is_written_to_keeps_its_parameters_only() -> None:
    class Written(Around):
        def forward(self, x: Tensor) -> Tensor:
            weight = torch.zeros(4, 4)
            weight[:2] = self.other[:2]
            weight.view(-1)[8:].copy_(self.other[2:].flatten())
            image = self.table.clone()
            image.view(-1)[:4] += x.mean()
            return (self.stem(x) @ weight @ image).flatten(1)

    products = probe(Written(nn.Identity()), torch.rand(2, 3, 4, 4)).products
    weights = [product.operands[1] for product in products if product.name in ("matmul", "__matmul__")]
    assert [(weight.fixed, weight.parameters) for weight in weights] == [(True, {"other"}), (False, set())]


def test_tensors_that_do_not_depend_on_the_image_are_fixed() -> None:
    class Table(Around):
        def forward(self, x: Tensor) -> Tensor:
            constant = self.table @ torch.arange(4.0)
            weight = self.other.softmax(0) * constant
            return (self.stem(x).flatten(2).mT @ weight + (self.table @ self.other).sum()).flatten(1)

    products = probe(Table(nn.Identity()), torch.rand(2, 3, 4, 4)).products
    assert [product.is_constant for product in products] == [True, False, False, True]
    flags = {
        product.name + str(i): [bool(o.parameters) for o in product.operands] for i, product in enumerate(products)
    }
    assert flags == {
        "matmul0": [False, False],
        "conv2d1": [False, True],
        "matmul2": [False, True],
        "matmul3": [False, True],
    }


@pytest.mark.parametrize("nonnegative", [True, False])
def test_the_image_is_an_origin_of_its_own(nonnegative: bool) -> None:
    found = probe(Around(nn.Identity()), torch.rand(2, 3, 4, 4), nonnegative=nonnegative).products[0]
    read, weight = found.operands
    assert (read.origin, read.nonnegative) == (IMAGE, nonnegative)
    assert (weight.fixed, weight.parameters) == (True, {"stem.weight"})
