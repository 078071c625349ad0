"""Contracts of schedules, gradient rules, objectives and regularizers, and whether the checks find broken ones."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from examples.objectives.feature_matching import FeatureMatching
from qadtr_brevitas.core.plugin import plugin
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.core.registry import GRADIENT_RULES, OBJECTIVES, REGULARIZERS, SCHEDULES
from qadtr_brevitas.quant import set_precision
from qadtr_brevitas.testing.training import check_gradient_rule, check_objective, check_regularizer, check_schedule
from qadtr_brevitas.training.gir import Gir, GirOptimizer
from qadtr_brevitas.training.objectives import Objective
from qadtr_brevitas.training.regularizers import Distillation
from qadtr_brevitas.training.schedules import Cycle, Uniform
from qadtr_brevitas.training.step import ForwardOutput, StepLoss, TrainingStep

FOUR = Precision(4, 4)


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_schedules(name: str) -> None:
    check_schedule(SCHEDULES.load(name)())


@pytest.mark.parametrize("schedule", [Uniform(independent=True), Cycle(epochs_each=2)])
def test_schedules_with_settings(schedule: Any) -> None:
    check_schedule(schedule)


@pytest.mark.parametrize("name", GRADIENT_RULES.names())
def test_gradient_rules(name: str) -> None:
    check_gradient_rule(GRADIENT_RULES.load(name)())


@pytest.mark.parametrize("rule", [Gir(frequency=1.0, only=(FOUR,)), Gir(frequency=1.0, mode="relative", norm="global")])
def test_gradient_rules_with_settings(rule: Gir) -> None:
    check_gradient_rule(rule)


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_objectives(name: str) -> None:
    check_objective(OBJECTIVES.load(name)())


def test_the_objective_of_the_examples() -> None:
    check_objective(FeatureMatching())


@pytest.mark.parametrize("name", REGULARIZERS.names())
def test_regularizers(name: str) -> None:
    check_regularizer(REGULARIZERS.load(name)())


class GlobalSchedule(Uniform):
    """Draws from the global stream."""

    def precisions(self, step: int, *, seed: int, epoch: int, epochs: int) -> tuple[Precision, ...]:
        return (random.choice(self.choices),)


class UndeclaredSchedule(Uniform):
    """Declares less than it draws."""

    def possible(self) -> tuple[Precision, ...]:
        return (FOUR,)


@pytest.mark.parametrize(
    ("schedule", "facts"),
    [(GlobalSchedule(), "other precisions"), (UndeclaredSchedule(), r"possible\(\) does not name")],
)
def test_broken_schedules_are_found(schedule: Uniform, facts: str) -> None:
    with pytest.raises(AssertionError, match=facts):
        check_schedule(schedule)


class GlobalNoise(GirOptimizer):
    """Draws from the global stream."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.grad += torch.randn_like(weight.grad)
        return self.optimizer.step()


class ForgetfulGir(GirOptimizer):
    """Loads no state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""


class EverywhereGir(GirOptimizer):
    """Changes gradients at every precision."""

    def set_context(self, *, step: int, precision: Precision | None) -> None:
        super().set_context(step=step, precision=None)


@pytest.mark.parametrize(
    ("optimizer", "facts"),
    [(GlobalNoise, "load_state_dict|ranks"), (ForgetfulGir, "load_state_dict"), (EverywhereGir, "at 32, which is not")],
)
def test_broken_gradient_rules_are_found(optimizer: type[GirOptimizer], facts: str) -> None:
    class Rule(Gir):
        def wrap(self, wrapped: torch.optim.Optimizer, *, seed: int) -> GirOptimizer:
            return optimizer(wrapped, self, seed=seed)

    with pytest.raises(AssertionError, match=facts):
        check_gradient_rule(Rule(frequency=1.0, only=(FOUR,)))


@plugin
class Broken(Objective):
    """The ordinary loss, with one thing wrong."""

    fault: str

    def compute(self, step: TrainingStep) -> StepLoss:
        loss = step.default_loss().loss
        if self.fault == "precision":
            set_precision(step._model, 2)
        elif self.fault == "mode":
            step._model.eval()
        elif self.fault == "gradient":
            loss.backward(retain_graph=True)
        elif self.fault == "images":
            step.images.zero_()
        elif self.fault == "random":
            loss = loss + torch.rand((), generator=torch.Generator().manual_seed(torch.Generator().seed() % 2**62))
        elif self.fault == "hook":
            step._model.register_forward_hook(lambda *_: None)
        elif self.fault == "nan":
            loss = loss * float("nan")
        elif self.fault == "constant":
            loss = loss.detach()
        return StepLoss(loss.expand(2) if self.fault == "shape" else loss)


@pytest.mark.parametrize(
    ("fault", "facts"),
    [
        ("precision", "left at 2"),
        ("mode", "evaluation mode"),
        ("gradient", "gradients are left behind"),
        ("images", "images are changed"),
        ("random", "another loss"),
        ("hook", "hooks are left behind"),
        ("nan", "loss is nan"),
        ("constant", "no gradient"),
        ("shape", r"shape \(2,\)"),
    ],
)
def test_broken_objectives_are_found(fault: str, facts: str) -> None:
    with pytest.raises(AssertionError, match=facts):
        check_objective(Broken(fault=fault))


def test_a_regularizer_that_never_adds_a_loss_is_found() -> None:
    class Silent(Distillation):
        def compute(self, step: TrainingStep, output: ForwardOutput) -> StepLoss | None:
            return None

    with pytest.raises(AssertionError, match="no loss at any precision"):
        check_regularizer(Silent())
