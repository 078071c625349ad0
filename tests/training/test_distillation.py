import pytest
import torch
from torch import Tensor

from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.training.regularizers import Distillation

FOUR, FLOAT = Precision(4, 4), Precision(32, 32)
IMAGES = torch.zeros(2, 3, 4, 4)
LOGITS = torch.tensor([[1.0, 0.0, -1.0], [0.5, 0.5, 2.0]])


def teacher(images: Tensor) -> Tensor:
    return torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 2.0]])


def test_matches_the_formula() -> None:
    target, student = (logits.div(2.0).softmax(1) for logits in (teacher(IMAGES), LOGITS))
    expected = 0.3 * 4 * (target * (target / student).log()).sum(1).mean()
    loss = Distillation(weight=0.3, temperature=2.0).loss(LOGITS, IMAGES, teacher=teacher, precision=FOUR)
    assert loss is not None
    torch.testing.assert_close(loss, expected)


def test_is_zero_for_equal_logits_and_has_a_gradient_otherwise() -> None:
    same = Distillation().loss(teacher(IMAGES), IMAGES, teacher=teacher, precision=FOUR)
    assert same is not None
    assert same.item() == pytest.approx(0, abs=1e-6)
    logits = LOGITS.clone().requires_grad_()
    loss = Distillation().loss(logits, IMAGES, teacher=teacher, precision=FOUR)
    assert loss is not None
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0


def test_says_nothing_at_32_bit() -> None:
    assert Distillation().loss(LOGITS, IMAGES, teacher=teacher, precision=FLOAT) is None
