"""Contract checks of schedules, gradient rules, objectives and regularizers, for this package's own and for others.

from qadtr_brevitas.testing.training import check_objective

def test_mine():
    check_objective(MyObjective())
"""

from __future__ import annotations

import random
from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

from qadtr_brevitas.core.precision import DEFAULT_BITS, Precision, parse_precisions
from qadtr_brevitas.quant import SwitchableModel, allowed_precisions, calibrate, convert, get_precision, set_precision
from qadtr_brevitas.training.gradient_rules import GradientRule, GradientRuleOptimizer
from qadtr_brevitas.training.log import as_figures
from qadtr_brevitas.training.objectives import Objective, ordinary_loss
from qadtr_brevitas.training.regularizers import Regularizer
from qadtr_brevitas.training.schedules import Schedule
from qadtr_brevitas.training.step import AdversarialBatch, ForwardOutput, StepLoss, TrainingStep

_EPOCHS, _STEPS = 5, 40
_IMAGES, _CLASSES = 8, 4


def check_schedule(schedule: Schedule) -> None:
    """Check that a schedule draws only precisions that it declares, and the same ones for the same seed and step.

    Raises:
        AssertionError: the schedule breaks the contract; the message says how.
    """
    possible = schedule.possible()
    assert possible, "possible() must name at least one precision"

    def draw(step: int) -> tuple[Precision, ...]:
        return schedule.precisions(step, seed=7, epoch=step * _EPOCHS // _STEPS, epochs=_EPOCHS)

    drawn = {step: draw(step) for step in range(_STEPS)}
    for step, precisions in drawn.items():
        assert precisions, f"step {step} has no precision"
        foreign = [str(precision) for precision in precisions if precision not in possible]
        assert not foreign, f"step {step} has {foreign}, which possible() does not name"
    # Neither the order of the calls nor global random streams may matter: a resumed run asks for later steps only.
    random.seed(1)
    torch.manual_seed(1)
    for step in reversed(range(_STEPS)):
        assert draw(step) == drawn[step], f"step {step} has other precisions when it is asked for again"


def check_gradient_rule(rule: GradientRule) -> None:
    """Check that the optimizer of a gradient rule can be scheduled and resumed, and is equal on every rank.

    Raises:
        AssertionError: the gradient rule breaks the contract; the message says how.
    """
    first = rule.precisions
    precision = Precision(4, 4) if first is None else first[0]
    weights = _weights()
    optimizer = rule.wrap(_sgd(weights), seed=7)
    assert isinstance(optimizer, GradientRuleOptimizer), "wrap() must return a GradientRuleOptimizer"
    _step(optimizer, weights, range(4), precision)
    for name, value in optimizer.metrics().items():
        assert isinstance(value, float), f"metric {name!r} is {type(value).__name__}, not float"
    _check_resuming(rule, weights, optimizer, precision)
    _check_ranks(rule, precision)
    _check_scheduling(rule)
    _check_untouched(rule, precision)


def check_objective(objective: Objective, *, model: SwitchableModel | None = None) -> None:
    """Check loss, metrics and side effects of an objective at every precision of a model.

    Args:
        objective: the objective.
        model: a calibrated model; None for a small convolutional network with the modules `conv1`, `layer1`, `layer2`
            and `fc`, at 32, 8, 5, 4 and 2 bit and the precisions of the objective.

    Raises:
        AssertionError: the objective breaks the contract; the message says how.
    """
    model = _model(objective.precisions) if model is None else model
    _check_losses(model, lambda step: objective.compute(step))


def check_regularizer(regularizer: Regularizer, *, model: SwitchableModel | None = None) -> None:
    """Check loss, metrics and side effects of a regularizer at every precision of a model.

    Args:
        regularizer: the regularizer; at some precision at least it must add a loss.
        model: as of `check_objective`.

    Raises:
        AssertionError: the regularizer breaks the contract; the message says how.
    """
    model = _model(regularizer.precisions) if model is None else model

    def compute(step: TrainingStep) -> StepLoss | None:
        output = step.forward(step.adversarial.images, features=regularizer.features)
        return regularizer.compute(step, output)

    _check_losses(model, compute)


def _check_losses(model: SwitchableModel, compute: Callable[[TrainingStep], StepLoss | None]) -> None:
    results = [_check_loss(model, compute, precision) for precision in allowed_precisions(model)]
    assert any(results), "there is no loss at any precision"


def _check_loss(
    original: SwitchableModel, compute: Callable[[TrainingStep], StepLoss | None], precision: Precision
) -> bool:
    """Check a loss at one precision, and return whether there is one."""
    losses: list[Tensor] = []
    for _ in range(2):
        model = deepcopy(original).train()
        set_precision(model, precision)
        step = _training_step(model, precision)
        before = step.images.clone()
        torch.manual_seed(0)
        result = compute(step)
        assert get_precision(model) == precision, f"at {precision} the model is left at {get_precision(model)}"
        changed = [name for name, module in model.named_modules() if not module.training]
        assert not changed, f"at {precision} the modules {changed} are left in evaluation mode"
        assert torch.equal(step.images, before), f"at {precision} the images are changed"
        assert _hooks(model) == _hooks(original), f"at {precision} hooks are left behind"
        graded = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
        assert not graded, f"at {precision} gradients are left behind in {graded}"
        if result is None:
            return False
        losses.append(result.loss)
        _check_result(model, result, precision)
    assert torch.equal(*losses), f"at {precision} the same step has another loss when it is computed again"
    return True


def _hooks(model: nn.Module) -> int:
    # Torch has no public way to list the hooks of a module.
    return sum(len(module._forward_hooks) for module in model.modules())  # pyright: ignore[reportPrivateUsage]


def _check_result(model: SwitchableModel, result: StepLoss, precision: Precision) -> None:
    loss = result.loss
    assert loss.ndim == 0, f"at {precision} the loss has shape {tuple(loss.shape)}, it must be 0-dim"
    assert loss.isfinite(), f"at {precision} the loss is {loss.item()}"
    as_figures(result.metrics)
    assert loss.requires_grad, f"at {precision} the loss has no gradient"
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any(gradient.count_nonzero() for gradient in gradients.values()), f"at {precision} all gradients are zero"
    broken = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    assert not broken, f"at {precision} the gradients of {broken} are not finite"


def _model(precisions: tuple[Precision, ...]) -> SwitchableModel:
    """Return a small calibrated network that has the given precisions among others."""

    def block(channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(4, channels, 3, stride, 1), nn.BatchNorm2d(channels), nn.ReLU())

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential()
        network.add_module("conv1", nn.Conv2d(3, 4, 3, padding=1))
        network.add_module("act1", nn.ReLU())
        network.add_module("layer1", block(4, 1))
        network.add_module("layer2", block(8, 2))
        network.add_module("flatten", nn.Flatten())
        network.add_module("fc", nn.Linear(8 * 4 * 4, _CLASSES))
    wanted = dict.fromkeys((*parse_precisions(DEFAULT_BITS), *precisions))
    model = convert(network, mean=(0.5,) * 3, std=(0.25,) * 3, image_size=(8, 8), precisions=list(wanted))
    calibrate(model, [_images()])
    return model


def _images() -> Tensor:
    return torch.rand(_IMAGES, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _training_step(model: SwitchableModel, precision: Precision) -> TrainingStep:
    """Return a step whose first half of the images is attacked, by inverting them."""
    images = _images()

    def attack() -> AdversarialBatch:
        half = _IMAGES // 2
        return AdversarialBatch(torch.cat([1 - images[:half], images[half:]]), half)

    def default_loss(step: TrainingStep, output: ForwardOutput) -> StepLoss:
        return ordinary_loss(step, output, label_smoothing=0.0, regularizers=())

    return TrainingStep(
        model,
        images,
        torch.arange(_IMAGES) % _CLASSES,
        precision=precision,
        number=3,
        seed=7,
        rank=0,
        attack=attack,
        default_loss=default_loss,
    )


def _weights() -> list[nn.Parameter]:
    rng = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=rng)) for shape in ((4, 3), (4,), (2, 2))]


def _sgd(weights: list[nn.Parameter]) -> torch.optim.SGD:
    return torch.optim.SGD(weights, lr=0.1, momentum=0.9)


def _step(
    optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], steps: range, precision: Precision | None
) -> None:
    """Take steps with gradients that depend on their number only; the last weight has none."""
    for number in steps:
        optimizer.zero_grad()
        rng = torch.Generator().manual_seed(number)
        for weight in weights[:-1]:
            weight.grad = torch.randn(weight.shape, generator=rng)
        if isinstance(optimizer, GradientRuleOptimizer):
            optimizer.set_context(step=number, precision=precision)
        optimizer.step()


def _equal(one: list[nn.Parameter], other: list[nn.Parameter]) -> bool:
    return all(map(torch.equal, one, other))


def _check_resuming(
    rule: GradientRule, weights: list[nn.Parameter], optimizer: GradientRuleOptimizer, precision: Precision
) -> None:
    """Check that steps after loading a state are those that would have followed."""
    resumed = deepcopy(weights)
    other = rule.wrap(_sgd(resumed), seed=7)
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    _step(optimizer, weights, range(4, 8), precision)
    _step(other, resumed, range(4, 8), precision)
    assert _equal(weights, resumed), "after load_state_dict() the steps are other ones than without it"


def _check_ranks(rule: GradientRule, precision: Precision) -> None:
    """Check that equal gradients give equal steps, whatever was drawn from the global random streams before."""
    ranks: list[list[nn.Parameter]] = []
    for rank in range(2):
        random.seed(rank)
        torch.manual_seed(rank)
        weights = _weights()
        _step(rule.wrap(_sgd(weights), seed=7), weights, range(8), precision)
        ranks.append(weights)
    assert _equal(*ranks), "two ranks with equal gradients take different steps: draw from (seed, step) only"


def _check_scheduling(rule: GradientRule) -> None:
    weights = _weights()
    inner = _sgd(weights)
    optimizer = rule.wrap(inner, seed=7)
    for group in optimizer.param_groups:
        group["lr"] = 0.025
    assert inner.param_groups[0]["lr"] == 0.025, "param_groups must be those of the wrapped optimizer"
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    _step(optimizer, weights, range(1), None)
    scheduler.step()
    assert inner.param_groups[0]["lr"] == 0.0125, "a learning rate scheduler must reach the wrapped optimizer"


def _check_untouched(rule: GradientRule, precision: Precision) -> None:
    """Check parameters without gradients, and the precisions at which the rule is to change nothing."""
    weights = _weights()
    _step(rule.wrap(_sgd(weights), seed=7), weights, range(8), precision)
    assert torch.equal(weights[-1], _weights()[-1]), "a parameter without a gradient is changed"
    if rule.precisions is not None:
        other = next(p for p in parse_precisions([32, 8, 7, 6, 5, 4, 3, 2]) if p not in rule.precisions)
        changed, plain = _weights(), _weights()
        _step(rule.wrap(_sgd(changed), seed=7), changed, range(8), other)
        _step(_sgd(plain), plain, range(8), other)
        assert _equal(changed, plain), f"gradients change at {other}, which is not among the rule's precisions"
