"""ALRS: learning rates of thresholds per bit-width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from qadtr_brevitas.config import OptimizerSection
from qadtr_brevitas.quant import SwitchableModel, at_precision, quantizer_parameters
from qadtr_brevitas.quant.switchable_quant import SwitchableQuant
from qadtr_brevitas.training.alrs import adapt_learning_rates, threshold_groups
from qadtr_brevitas.training.loop import train
from qadtr_brevitas.training.setup import make_optimizer
from tests.training.support import Recorder, calibrated_model, make_recipe, same_weights

RATE, KEY = 0.05, "alrs_bits_below"


class _StopAfter(Recorder):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.limit = steps

    def on_step(self, record: Any) -> None:
        if record.step > self.limit:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def model() -> SwitchableModel:
    return calibrated_model()


def stepped(model: SwitchableModel, bits: int, *, factor: float = 1.0) -> dict[int, float]:
    """Learning rates by bits below the highest after a backward pass at a precision."""
    optimizer = make_optimizer(model, OptimizerSection(lr=RATE, threshold_rule="alrs", threshold_lr_scale=factor))
    optimizer.zero_grad()
    # The network has dropout.
    torch.manual_seed(0)
    with at_precision(model.train(), bits):
        model(torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    adapt_learning_rates(optimizer)
    return {group[KEY]: group["lr"] for group in optimizer.param_groups if KEY in group}


def test_the_groups_hold_each_threshold_once(model: SwitchableModel) -> None:
    groups = threshold_groups(model)
    found = [id(threshold) for group in groups for threshold in group["params"]]
    assert sorted(found) == sorted(id(threshold) for threshold in quantizer_parameters(model))
    optimizer = make_optimizer(model, OptimizerSection(threshold_rule="alrs", weight_decay=0.1))
    assert {group["weight_decay"] for group in optimizer.param_groups if KEY in group} == {0.0}


@pytest.mark.parametrize("bits", [4, 2])
def test_the_rate_is_that_of_the_formula(model: SwitchableModel, bits: int) -> None:
    rates = stepped(model, bits)
    gradients = [
        module.thresholds[str(bits)].grad
        for module in model.modules()
        if isinstance(module, SwitchableQuant) and str(bits) in module.thresholds
    ]
    sizes = [min(float(gradient.abs().max()), RATE) for gradient in gradients if gradient is not None]
    assert sizes
    expected = 10 ** (-(8 - bits) / 2) * (RATE - sum(sizes) / len(sizes))
    assert rates[8 - bits] == pytest.approx(expected)
    # Thresholds without gradients, of the other bit-width, keep their rate.
    assert rates[8 - (6 - bits)] == RATE


def test_the_factor_scales_and_other_optimizers_are_left_alone(model: SwitchableModel) -> None:
    whole, half = stepped(model, 2), stepped(model, 2, factor=0.5)
    assert half[6] == pytest.approx(whole[6] / 2)
    plain = make_optimizer(model, OptimizerSection(lr=RATE))
    adapt_learning_rates(plain)
    assert {group["lr"] for group in plain.param_groups} == {RATE}


def test_optimizers_that_normalize_gradients_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"alrs.*sgd.*adamw.*constant"):
        OptimizerSection(name="adamw", threshold_rule="alrs")


@pytest.mark.slow
def test_a_run_with_everything_of_the_2_bit_recipe_resumes_bit_for_bit(tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "epochs": 1,
        "float_epochs": 0,
        "optimizer": {"lr": 0.02, "threshold_rule": "alrs"},
        "scheduler": {"warmup_epochs": 0},
        "precision": {"schedule": "sandwich", "choices": [32, 4, 2]},
        "attack": None,
        "update": "each",
        "regularizers": [{"name": "distillation", "teacher": "chain"}, "weight-distribution"],
        "checkpoint_every": 2,
        "norm_batches": 0,
    }
    recipe = make_recipe(**keys)
    train(recipe, tmp_path / "whole", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "stopped", device="cpu", observer=_StopAfter(3))
    train(recipe, tmp_path / "stopped", device="cpu")
    assert same_weights(tmp_path / "whole", tmp_path / "stopped")
