"""Which calls are products, and where their operands stand."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qadtr_brevitas.quant.products import call_with, is_product, operands


def test_operands_are_found_by_position_and_by_name() -> None:
    x, w = torch.rand(2, 3), torch.rand(4, 3)
    for args, kwargs in (((x, w), {}), ((x,), {"weight": w}), ((), {"input": x, "weight": w})):
        found = operands("linear", args, kwargs)
        assert list(found) == ["input", "weight"]
        assert found["input"] is x
        assert found["weight"] is w
        new = {"input": x * 2, "weight": w * 3}
        torch.testing.assert_close(call_with(new, F.linear, "linear", args, kwargs), 6 * x @ w.T)


def test_the_summand_of_a_product_is_not_an_operand() -> None:
    added, left, right = torch.rand(2, 2, 2), torch.rand(2, 2, 3), torch.rand(2, 3, 2)
    found = operands("baddbmm", (added, left, right), {})
    assert found["left"] is left
    assert found["right"] is right
    new = {"left": left * 2, "right": right}
    result = call_with(new, torch.baddbmm, "baddbmm", (added, left, right), {"beta": 0.5})
    torch.testing.assert_close(result, 0.5 * added + 2 * left @ right)


@pytest.mark.parametrize("listed", [False, True])
def test_einsum(listed: bool) -> None:
    left, right = torch.rand(2, 3), torch.rand(3, 4)
    args = ("ij,jk->ik", [left, right]) if listed else ("ij,jk->ik", left, right)
    assert is_product("einsum", args)
    found = operands("einsum", args, {})
    assert [x is y for x, y in zip(found.values(), (left, right), strict=True)] == [True, True]
    doubled: dict[str, Tensor] = {label: 2 * x for label, x in found.items()}
    torch.testing.assert_close(call_with(doubled, torch.einsum, "einsum", args, {}), 4 * left @ right)


def test_an_einsum_of_one_operand_is_no_product() -> None:
    assert not is_product("einsum", ("ij->ji", torch.rand(2, 3)))
    assert not is_product("add", (1, 2))
