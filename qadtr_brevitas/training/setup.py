"""The optimizer and the learning rate of a run, and whether a recipe fits the model it trains."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import OptimInfo, create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import create_scheduler_v2
from torch import nn

from qadtr_brevitas.config import OptimizerSection, Recipe, TrainSection
from qadtr_brevitas.core.errors import UsageError, suggest
from qadtr_brevitas.quant import precisions_or_all, quantizer_parameters
from qadtr_brevitas.training.alrs import threshold_groups
from qadtr_brevitas.training.gir import GIR_KEY
from qadtr_brevitas.training.phases import TrainingPhase
from qadtr_brevitas.training.regularizers import Distillation
from qadtr_brevitas.training.step import FLOAT

_WARMUP_START = 0.01
# Float16 holds whole numbers up to 2^11 exactly.
_FLOAT16_BITS = 11


def check_precisions(model: nn.Module, recipe: Recipe) -> None:
    """Check that the model has every precision that training may run it at, and float16 the levels of each.

    Raises:
        UsageError: the model lacks a precision, or float16 is too coarse for one.
    """
    train = recipe.train
    drawn = precisions_or_all(model, train.precision.possible())
    most = max((p.act for p in drawn if not p.is_float), default=0)
    if train.amp == "fp16" and most > _FLOAT16_BITS:
        raise UsageError(
            f"train.amp=fp16 holds activations of up to {_FLOAT16_BITS} bit, and the precisions go up to {most}: "
            "give train.amp=bf16 or train.amp=no"
        )
    also_run = [precision for plugin in (train.objective, *train.regularizers) for precision in plugin.precisions]
    for precision in (*also_run, *([FLOAT] if train.float_epochs else [])):
        precisions_or_all(model, (precision,))
    _check_chains(recipe)


def _check_chains(recipe: Recipe) -> None:
    """Check that a chain of teachers has several precisions a step."""
    train = recipe.train
    drawn = train.precision.precisions(0, seed=recipe.seed, epoch=0, epochs=train.epochs)
    if len(drawn) == 1 and any(isinstance(r, Distillation) and r.teacher == "chain" for r in train.regularizers):
        raise UsageError(
            "distillation with teacher=chain needs several precisions a step: give train.precision.schedule=sandwich, "
            "or teacher=float"
        )


def check_optimizer(section: OptimizerSection) -> OptimInfo:
    """Return what timm knows about an optimizer, without making one.

    Raises:
        UsageError: timm has no optimizer of that name.
    """
    try:
        return get_optimizer_info(section.name)
    except ValueError:
        hint = suggest(section.name, map(str, list_optimizers()))
        raise UsageError(f"timm has no optimizer {section.name!r}: {hint}") from None


def make_optimizer(model: nn.Module, section: OptimizerSection) -> torch.optim.Optimizer:
    """Return an optimizer by timm's name, with no weight decay on norms, biases and quantizer thresholds.

    Make it after the weights are loaded: loading replaces Brevitas's parameters.

    Raises:
        UsageError: timm has no optimizer of that name.
    """
    info = check_optimizer(section)
    adam_like = info.has_betas and not info.has_momentum and info.num_betas == 2
    extra: dict[str, Any] = {"betas": (section.momentum, 0.999)} if adam_like else {}
    return create_optimizer_v2(
        _parameter_groups(model, section),
        opt=section.name,
        lr=section.lr,
        weight_decay=section.weight_decay,
        momentum=section.momentum,
        **extra,
    )


def make_scheduler(optimizer: torch.optim.Optimizer, train: TrainSection, phase: TrainingPhase) -> Scheduler:
    """Return a learning rate scheduler by timm over one phase.

    Call its `step_update` with the number of steps since the phase began, after each step.
    """
    section = train.scheduler
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=section.name,
        num_epochs=phase.epochs,
        # A short float phase warms up for its first half at most.
        warmup_epochs=min(section.warmup_epochs, phase.epochs / 2),  # pyright: ignore[reportArgumentType]
        # Not 0, which would waste the first step.
        warmup_lr=_WARMUP_START * train.optimizer.lr,
        min_lr=section.min_lr,
        decay_epochs=section.decay_epochs,
        decay_rate=1.0 if section.name == "poly" else section.decay_rate,
        step_on_epochs=False,
        updates_per_epoch=phase.steps_per_epoch,
    )
    assert scheduler is not None
    return scheduler


def _parameter_groups(model: nn.Module, section: OptimizerSection) -> list[dict[str, Any]]:
    """Return weights, parameters without weight decay, and thresholds, which have a learning rate factor too."""
    threshold_ids = {id(parameter) for parameter in quantizer_parameters(model)}
    weights: list[nn.Parameter] = []
    without_decay: list[nn.Parameter] = []
    thresholds: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_threshold = id(parameter) in threshold_ids
            group = thresholds if is_threshold else weights if parameter.ndim > 1 else without_decay
            group.append(parameter)
    of_thresholds = threshold_groups(model) if section.threshold_rule == "alrs" else [{"params": thresholds}]
    # timm's schedulers multiply the learning rate by lr_scale. GIR's normalized gradient of a single number is its
    # sign: a threshold would take steps of one size, however flat the loss.
    settings: dict[str, Any] = {"weight_decay": 0.0, "lr_scale": section.threshold_lr_scale, GIR_KEY: False}
    groups: list[dict[str, Any]] = [
        {"params": weights},
        {"params": without_decay, "weight_decay": 0.0},
        *({**group, **settings} for group in of_thresholds),
    ]
    return [group for group in groups if group["params"]]
