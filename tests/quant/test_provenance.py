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
        return self.between(self.act(self.stem(x))) @ self.other


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


def test_tensors_that_do_not_depend_on_the_image_are_fixed() -> None:
    class Table(Around):
        def forward(self, x: Tensor) -> Tensor:
            constant = self.table @ torch.arange(4.0)
            weight = self.other.softmax(0) * constant
            return self.stem(x).flatten(2).mT @ weight + (self.table @ self.other).sum()

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
