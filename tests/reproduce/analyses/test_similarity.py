from __future__ import annotations

import pytest
import torch

from qadtr_brevitas.reproduce.analyses.similarity import Average, cosines, squared_errors

WHOLE = torch.ones(2, 1, 4, 4, dtype=torch.bool)


def test_a_gradient_agrees_with_its_multiples_and_not_with_its_opposite() -> None:
    gradient = torch.randn(2, 3, 4, 4)
    assert cosines(gradient, 3 * gradient, WHOLE).tolist() == pytest.approx([1, 1])
    assert cosines(-gradient, gradient, WHOLE).tolist() == pytest.approx([-1, -1])
    errors, relative = squared_errors(2 * gradient, gradient, WHOLE)
    assert relative == pytest.approx(1)
    assert errors.tolist() == pytest.approx(gradient.double().square().flatten(1).mean(dim=1).tolist())


def test_only_the_region_counts() -> None:
    first, second = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    region = torch.zeros_like(WHOLE)
    region[:, :, :2, :2] = True
    first[:, :, :2, :2] = second[:, :, :2, :2]
    assert cosines(first, second, region).tolist() == pytest.approx([1, 1])
    assert squared_errors(first, second, region)[0].tolist() == [0, 0]
    assert cosines(first, second, WHOLE).max() < 0.999


def test_images_without_a_gradient_are_left_out() -> None:
    gradient = torch.randn(2, 3, 4, 4)
    gradient[0] = 0
    assert len(cosines(gradient, torch.ones_like(gradient), WHOLE)) == 1
    assert squared_errors(gradient, torch.zeros_like(gradient), WHOLE)[1] is None
    assert Average.of(torch.empty(0)) == Average(None, None, None, 0)


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    found = Average.of(torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64))
    assert found.value == 0.5
    assert found.low == pytest.approx(0.5 - 1.96 * (1 / 3) ** 0.5 / 2)
    assert found.high == pytest.approx(0.5 + 1.96 * (1 / 3) ** 0.5 / 2)
