from typing import Any, cast

import pytest
import torch
from torch import Tensor

from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.quant import set_precision
from qadtr_brevitas.training.regularizers import Distillation
from qadtr_brevitas.training.step import AdversarialBatch, ForwardOutput, StepLoss, TrainingStep
from tests.training.support import calibrated_model

FOUR, FLOAT = Precision(4, 4), Precision(32, 32)
IMAGES = torch.zeros(2, 3, 4, 4)
LOGITS = torch.tensor([[1.0, 0.0, -1.0], [0.5, 0.5, 2.0]])
TEACHER = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 2.0]])


class Step:
    """A step whose teacher always gives the same logits."""

    def __init__(self, precision: Precision = FOUR) -> None:
        self.precision, self.adversarial = precision, AdversarialBatch(IMAGES, 0)

    def teacher(self, images: Tensor) -> ForwardOutput:
        assert images is IMAGES
        return ForwardOutput(TEACHER, {})


def distill(logits: Tensor, regularizer: Distillation, precision: Precision = FOUR) -> Tensor | None:
    result = regularizer.compute(cast(TrainingStep, Step(precision)), ForwardOutput(logits, {}))
    if result is None:
        return None
    assert result.metrics == {"distillation": result.loss}
    return result.loss


def test_matches_the_formula() -> None:
    target, student = (logits.div(2.0).softmax(1) for logits in (TEACHER, LOGITS))
    expected = 0.3 * 4 * (target * (target / student).log()).sum(1).mean()
    loss = distill(LOGITS, Distillation(weight=0.3, temperature=2.0))
    assert loss is not None
    torch.testing.assert_close(loss, expected)


def test_is_zero_for_equal_logits_and_has_a_gradient_otherwise() -> None:
    same = distill(TEACHER, Distillation())
    assert same is not None
    assert same.item() == pytest.approx(0, abs=1e-6)
    logits = LOGITS.clone().requires_grad_()
    loss = distill(logits, Distillation())
    assert loss is not None
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0


def test_adds_nothing_at_32_bit() -> None:
    assert distill(LOGITS, Distillation(), FLOAT) is None


def chained(step: TrainingStep) -> Tensor | None:
    result = Distillation(weight=1.0, teacher="chain").compute(step, step.forward(step.images))
    return None if result is None else result.loss


def sum_of_logits(step: TrainingStep, output: ForwardOutput) -> StepLoss:
    return StepLoss(output.logits.sum())


@pytest.mark.parametrize("attacked", [False, True])
def test_a_chain_learns_from_the_precision_before(attacked: bool) -> None:
    model = calibrated_model()
    model.net.drop.p = 0.0
    images, labels = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
    found: list[TrainingStep] = []
    for precision in (FLOAT, FOUR, Precision(2, 2)):

        def attack(precision: Precision = precision) -> AdversarialBatch:
            return AdversarialBatch(images * (1 - 1 / precision.act), 8) if attacked else AdversarialBatch(images, 0)

        earlier = found[-1].passed if found else None
        keys: dict[str, Any] = {"number": 0, "seed": 0, "rank": 0, "attack": attack, "earlier": earlier}
        set_precision(model.train(), precision)
        step = TrainingStep(model, images, labels, precision=precision, default_loss=sum_of_logits, **keys)
        step.default_loss()
        found.append(step)
    first, second, third = found
    assert chained(first) is None
    expected = found[0].passed.logits if not attacked else step_teacher(second, FLOAT)
    torch.testing.assert_close(second.earlier_logits(), expected, rtol=0, atol=0)
    assert not torch.equal(third.earlier_logits(), second.earlier_logits())
    assert chained(third) > 0


def step_teacher(step: TrainingStep, precision: Precision) -> Tensor:
    return step.teacher(step.adversarial.images, precision=precision).logits
