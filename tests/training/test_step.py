"""What an objective can do with a training step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.quant import SwitchableModel, allowed_precisions, at_precision, get_precision
from qadtr_brevitas.training.objectives import ordinary_loss
from qadtr_brevitas.training.step import AdversarialBatch, ForwardOutput, StepLoss, TrainingStep
from tests.training.support import calibrated_model, make_recipe

FOUR, FLOAT = Precision(4, 4), Precision(32, 32)


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    split = make_recipe().data.dataset.load("train")
    return split.batch(torch.arange(8))


@pytest.fixture
def model() -> SwitchableModel:
    return calibrated_model().train()


def make_step(model: SwitchableModel, batch: tuple[Tensor, Tensor], *, number: int = 3, rank: int = 0) -> TrainingStep:
    """A step at 4 bit, half of whose images are attacked by inverting them."""
    images, labels = batch

    def attack() -> AdversarialBatch:
        return AdversarialBatch(torch.cat([1 - images[:4], images[4:]]), 4)

    def default_loss(step: TrainingStep, output: ForwardOutput) -> StepLoss:
        return StepLoss(cross_entropy(output.logits, step.labels))

    model.switch.set(FOUR)
    return TrainingStep(
        model,
        images,
        labels,
        precision=FOUR,
        number=number,
        seed=0,
        rank=rank,
        attack=attack,
        default_loss=default_loss,
    )


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_a_forward_pass_runs_at_the_steps_precision_or_another_and_restores_it(
    model: SwitchableModel, batch: tuple[Tensor, Tensor]
) -> None:
    model.net.drop.p = 0.0
    step = make_step(model, batch)
    for wanted, precision in ((None, FOUR), (FLOAT, FLOAT)):
        found = step.forward(step.images, precision=wanted).logits
        assert get_precision(model) == FOUR
        assert model.training
        with at_precision(model, precision):
            assert torch.equal(found, model(step.images))
        assert found.requires_grad


def test_the_loss_of_mixed_images_is_that_of_their_shares(model: SwitchableModel, batch: tuple[Tensor, Tensor]) -> None:
    step, logits, shares = make_step(model, batch), torch.randn(8, 3), torch.tensor([[0.25, 0.75, 0.0]] * 8)
    step.targets = shares
    found = ordinary_loss(step, ForwardOutput(logits, {}), label_smoothing=0.1, regularizers=()).loss
    expected = -((shares * 0.9 + 0.1 / 3) * logits.log_softmax(dim=1)).sum(dim=1).mean()
    assert torch.allclose(found, expected)


def test_features_come_by_name_in_the_order_of_the_modules(
    model: SwitchableModel, batch: tuple[Tensor, Tensor]
) -> None:
    step = make_step(model, batch)
    before = hooks(model)
    output = step.forward(step.images, features=("act*", "linear"))
    assert list(output.features) == ["act1", "act2", "linear"]
    assert output.features["act2"].shape == (8, 16, 4, 4)
    assert output.features["linear"] is output.logits
    assert hooks(model) == before
    output.features["act1"].sum().backward()
    assert model.net.conv1.weight.grad is not None


def test_a_module_that_runs_twice_has_two_features(model: SwitchableModel, batch: tuple[Tensor, Tensor]) -> None:
    # Both activations are one module now.
    model.net.act2 = model.net.act1
    output = make_step(model, batch).forward(batch[0], features=("act1",))
    assert list(output.features) == ["act1", "act1#2"]


def test_wrong_feature_patterns_are_refused_and_leave_no_hooks(
    model: SwitchableModel, batch: tuple[Tensor, Tensor]
) -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, x: Tensor) -> Tensor:
            return self.pair(x)[0]

    step, before = make_step(model, batch), hooks(model)
    with pytest.raises(UsageError, match=r"'liner'.*'linear'"):
        step.forward(step.images, features=("act*", "liner"))
    model.net.drop = First()
    with pytest.raises(UsageError, match=r"drop\.pair.*tuple"):
        step.forward(step.images, features=("drop.pair",))
    assert hooks(model) == before


def test_the_teacher_runs_in_eval_mode_without_gradients(model: SwitchableModel, batch: tuple[Tensor, Tensor]) -> None:
    model.net.bn1.eval()
    step = make_step(model, batch)
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    output = step.teacher(step.images, features=("act1",))
    assert not output.logits.requires_grad
    assert not output.features["act1"].requires_grad
    assert get_precision(model) == FOUR
    assert (model.net.bn1.training, model.net.bn2.training, model.training) == (False, True, True)
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())
    with at_precision(model.eval(), FLOAT), torch.no_grad():
        assert torch.equal(output.logits, model(step.images))


def test_weights_that_autocast_copied_for_the_teacher_keep_their_gradients_afterwards(
    model: SwitchableModel, batch: tuple[Tensor, Tensor]
) -> None:
    step = make_step(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        step.teacher(step.images)
        step.forward(step.images, precision=FLOAT).logits.sum().backward()
    assert model.net.linear.weight.grad is not None
    assert model.net.linear.weight.grad.abs().sum() > 0


def test_adversarial_images_are_made_once_and_only_when_read(
    model: SwitchableModel, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = make_step(model, batch), []
    attack = step._attack
    monkeypatch.setattr(step, "_attack", lambda: calls.append(1) or attack())
    step.forward(step.images)
    assert not calls
    first, second = step.adversarial, step.adversarial
    assert first is second
    assert len(calls) == 1
    assert first.attacked == 4
    assert torch.equal(first.images[:4], 1 - step.images[:4])


def test_the_ordinary_loss_runs_the_model_on_adversarial_images_or_takes_an_output(
    model: SwitchableModel, batch: tuple[Tensor, Tensor]
) -> None:
    model.net.drop.p = 0.0
    step = make_step(model, batch)
    output = step.forward(step.adversarial.images)
    assert torch.equal(step.default_loss().loss, step.default_loss(output).loss)
    assert not torch.equal(step.default_loss().loss, step.default_loss(step.forward(step.images)).loss)


@pytest.mark.parametrize("precision", ["32", "4", "2"])
def test_the_gradient_of_the_images_can_be_minimized(
    precision: str, model: SwitchableModel, batch: tuple[Tensor, Tensor]
) -> None:
    step = make_step(model, batch)
    images = step.images.clone().requires_grad_()
    logits = step.forward(images, precision=Precision.parse(precision)).logits
    gradient = step.input_gradient(cross_entropy(logits, step.labels), images)
    assert gradient.shape == images.shape
    gradient.square().sum().backward()
    weight = model.net.conv1.weight.grad
    assert weight is not None
    assert weight.isfinite().all()
    assert weight.abs().sum() > 0


def test_random_streams_depend_on_step_rank_and_purpose(model: SwitchableModel, batch: tuple[Tensor, Tensor]) -> None:
    def draw(purpose: str = "noise", **keys: int) -> float:
        return torch.rand(1, generator=make_step(model, batch, **keys).generator(purpose)).item()

    assert draw() == draw()
    assert len({draw(), draw("other"), draw(number=4), draw(rank=1)}) == 4


def test_a_step_knows_all_precisions_of_the_model(model: SwitchableModel, batch: tuple[Tensor, Tensor]) -> None:
    assert make_step(model, batch).precisions == allowed_precisions(model)
