"""The regularizer of the weights' distribution: known moments, and what a step of it does."""

from __future__ import annotations

import pytest
import torch

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.quant.layers import low_bit_weights
from qadtr_brevitas.testing.training import check_regularizer
from qadtr_brevitas.training.setup import check_precisions
from qadtr_brevitas.training.weight_distribution import WeightDistribution, moments
from tests.training.support import calibrated_model, make_recipe


def test_contract() -> None:
    check_regularizer(WeightDistribution())


@pytest.mark.parametrize(
    ("values", "skewness", "kurtosis"),
    [
        (torch.linspace(-3, 5, 4001), 0.0, 1.8),
        (torch.randn(400_000, generator=torch.Generator().manual_seed(0)), 0.0, 3.0),
        (torch.tensor([-1.0, 1.0]), 0.0, 1.0),
        (torch.tensor([0.0, 0.0, 0.0, 1.0]), 1.1547, 2.3333),
        (torch.full((3, 4), 0.5), 0.0, 0.0),
    ],
)
def test_moments_of_known_distributions(values: torch.Tensor, skewness: float, kurtosis: float) -> None:
    torch.testing.assert_close(moments(values), torch.tensor([skewness, kurtosis]), rtol=0.01, atol=0.02)


def test_descending_it_brings_weights_to_a_uniform_distribution() -> None:
    weight = torch.randn(2000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=0.02)
    for _ in range(300):
        third, fourth = moments(weight)
        loss = (fourth - 1.8).square() + third.square()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(moments(weight).detach(), torch.tensor([0.0, 1.8]), rtol=0, atol=0.1)


def test_layers_that_keep_8_bit_are_left_out() -> None:
    model = calibrated_model()
    assert list(low_bit_weights(model)) == ["net.conv2"]


def test_a_chain_of_teachers_needs_several_precisions_a_step() -> None:
    chain = [{"name": "distillation", "teacher": "chain"}]
    model = calibrated_model()
    with pytest.raises(UsageError, match=r"teacher=chain.*sandwich"):
        check_precisions(model, make_recipe(regularizers=chain))
    check_precisions(model, make_recipe(regularizers=chain, precision={"schedule": "sandwich", "choices": [32, 4, 2]}))
