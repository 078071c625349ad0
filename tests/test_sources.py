from __future__ import annotations

import pytest
import torch

from qadtr_brevitas.errors import UsageError
from qadtr_brevitas.precision import Precision
from qadtr_brevitas.quant import at_precision, frozen_weights, get_precision
from qadtr_brevitas.sources import access_name, logits_at, parse_access, sorted_accesses
from tests.evaluation_fakes import Reader
from tests.evaluation_models import make_switchable


@pytest.mark.parametrize(
    ("given", "name"),
    [("4", "4"), (4, "4"), ("2+8+4", "8+4+2"), ("w4a8+2", "w4a8+2"), ("4 + 4", "4"), ((4, 8), "w4a8")],
)
def test_access_is_read_and_named(given: int | str | tuple[int, int], name: str) -> None:
    access = parse_access(given)
    assert access_name(access) == name
    assert parse_access(name) == parse_access(access) == access


@pytest.mark.parametrize("given", ["", "8+", "8+one", "+", "8+1", "8,4"])
def test_unreadable_access_is_refused(given: str) -> None:
    with pytest.raises(UsageError, match=r"cannot be read|not possible"):
        parse_access(given)


def test_means_come_after_precisions() -> None:
    assert sorted_accesses(["8+4", "2", "32+2", "w8a4", "32"]) == ["32", "w8a4", "2", "32+2", "8+4"]


def test_mean_is_of_the_logits_and_restores_the_precision() -> None:
    model = make_switchable()
    images = torch.rand(3, 3, 16, 16, requires_grad=True)
    with frozen_weights(model):
        single = []
        for bits in (32, 4):
            with at_precision(model, bits):
                single.append(model(images))
        before = get_precision(model)
        mean = logits_at(model, parse_access("32+4"))(images)
        assert get_precision(model) == before
        assert torch.equal(logits_at(model, (Precision(4, 4),))(images), single[1])
    assert torch.allclose(mean, (single[0] + single[1]) / 2)
    (gradient,) = torch.autograd.grad(mean.sum(), images)
    expected = sum(torch.autograd.grad(logits.sum() / 2, images)[0] for logits in single)
    assert torch.allclose(gradient, expected, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_precision_the_model_lacks_is_refused_at_once() -> None:
    with pytest.raises(UsageError, match=r"no precision 5: it was converted for 8, 4"):
        logits_at(Reader(), parse_access("8+5"))
