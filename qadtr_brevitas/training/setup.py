"""What the training loop is made of: processes and device, phases, optimizer and learning rate."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.optim import OptimInfo, create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler.scheduler_factory import create_scheduler_v2
from torch import Tensor, nn

from qadtr_brevitas.attacks.base import Memory
from qadtr_brevitas.config import OptimizerSection, Recipe, TrainSection
from qadtr_brevitas.core.device import resolve_device
from qadtr_brevitas.core.errors import UsageError, suggest
from qadtr_brevitas.core.precision import FLOAT_BITS, Precision
from qadtr_brevitas.quant import precisions_or_all, quantizer_parameters
from qadtr_brevitas.training.gir import GIR_KEY

FLOAT = Precision(FLOAT_BITS, FLOAT_BITS)
_FIRST_LR = 0.01
# Whole numbers up to 2^11 are exact.
_FLOAT16_BITS = 11
_RUNNING = ("running_mean", "running_var")


@dataclass(frozen=True)
class TrainingPhase:
    """A stretch of epochs with an optimizer and a learning rate curve of its own.

    Args:
        name: `float` before calibration, `quantized` after it.
        first_epoch: epochs before it.
        epochs: epochs of it.
        steps_per_epoch: optimizer steps of an epoch.
    """

    name: Literal["float", "quantized"]
    first_epoch: int
    epochs: int
    steps_per_epoch: int

    @property
    def first_step(self) -> int:
        """Steps before it."""
        return self.first_epoch * self.steps_per_epoch

    @property
    def end_step(self) -> int:
        """Steps up to its end."""
        return (self.first_epoch + self.epochs) * self.steps_per_epoch

    def precisions(self, recipe: Recipe, step: int) -> tuple[Precision, ...]:
        """The precisions of a step: 32 bit only in the float phase, where nothing is attacked or perturbed either."""
        if self.name == "float":
            return (FLOAT,)
        epoch = step // self.steps_per_epoch - self.first_epoch
        return recipe.train.precision.precisions(step, seed=recipe.seed, epoch=epoch, epochs=self.epochs)


def plan(train: TrainSection, images: int) -> list[TrainingPhase]:
    """The phases of a run over `images` training images; the last incomplete batch of an epoch is left out.

    Raises:
        UsageError: the images do not fill one batch.
    """
    steps = images // train.batch_size
    if steps == 0:
        raise UsageError(
            f"train.batch_size={train.batch_size} is more than the {images} training images: "
            f"give train.batch_size={images} or less"
        )
    phases = [
        TrainingPhase("float", 0, train.float_epochs, steps),
        TrainingPhase("quantized", train.float_epochs, train.epochs, steps),
    ]
    return [phase for phase in phases if phase.epochs]


@contextmanager
def started_processes(train: TrainSection, device: str) -> Generator[Accelerator]:
    """Joins the processes that torchrun started, or stands alone, with device and mixed precision set up.

    Raises:
        UsageError: no such device, one GPU for several processes, fp16 off a GPU, or a batch that cannot be shared
            equally.
    """
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    accelerator = _start_processes(train, device)
    try:
        yield accelerator
    finally:
        # A group that the caller made is the caller's to end.
        if not joined:
            accelerator.end_training()


def _start_processes(train: TrainSection, device: str) -> Accelerator:
    if ":" in device and "LOCAL_RANK" in os.environ:
        raise UsageError(f"device {device!r} is a single GPU, and torchrun gives each process one of its own: use cuda")
    wanted = resolve_device(device)
    if train.amp == "fp16" and wanted.type == "cpu":
        raise UsageError("train.amp=fp16 needs a GPU: give train.amp=bf16 or train.amp=no")
    if wanted.type == "cuda" and device != "auto":
        torch.cuda.set_device(wanted)
    # Accelerate keeps the first device and mixed precision of a process for good; another run of it may want others.
    AcceleratorState._reset_state(reset_partial_state=True)  # pyright: ignore[reportPrivateUsage]
    accelerator = Accelerator(cpu=wanted.type == "cpu", mixed_precision=train.amp)
    if train.batch_size % accelerator.num_processes:
        raise UsageError(
            f"train.batch_size={train.batch_size} cannot be shared by {accelerator.num_processes} processes: "
            "give a multiple of their number"
        )
    return accelerator


def check_agreement(run: Path, found: tuple[int, bool, bool], accelerator: Accelerator) -> None:
    """Makes sure that every process has found the same in the run directory; call it in all of them.

    Args:
        run: the directory.
        found: the step of the state or -1, whether the run is finished, and whether its model is there.
        accelerator: of this process.

    Raises:
        UsageError: they have not, so each would train something else.
    """
    own = torch.tensor([found], dtype=torch.int64, device=accelerator.device)
    everywhere = cast(Tensor, accelerator.gather(own))
    if (everywhere != everywhere[0]).any():
        steps = ", ".join("none" if step < 0 else str(step) for step in everywhere[:, 0].tolist())
        raise UsageError(
            f"the processes do not find the same state in {run} (steps: {steps}): put it on a disk that all of them see"
        )


def parallel(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The model as the training forward sees it: replicated over the processes, if there are several.

    Not `accelerator.prepare`, which would patch autocast into the model's own forward for good: attacks, validation
    and saving see the model itself.
    """
    if accelerator.num_processes == 1:
        return model
    # A step at one precision leaves the thresholds of the others without a gradient. Norm statistics are averaged by
    # `average_norm_statistics` instead of taken over from rank 0.
    return nn.parallel.DistributedDataParallel(
        model,
        device_ids=None if accelerator.device.type == "cpu" else [accelerator.device],
        find_unused_parameters=True,
        forward_sync_buffers=False,
    )


def average_norm_statistics(model: nn.Module, accelerator: Accelerator) -> None:
    """Averages the running norm statistics over all processes, in place, so that replicas stay equal."""
    buffers = [buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] in _RUNNING]
    # Networks with LayerNorm have none.
    if accelerator.num_processes == 1 or not buffers:
        return
    flat: Any = accelerator.reduce(torch.cat([buffer.flatten() for buffer in buffers]), "mean")
    for buffer, part in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))


def all_memories(memory: Memory, accelerator: Accelerator) -> Memory:
    """What the attack keeps in each process, (processes, ...); call it in all of them."""
    return {name: cast(Tensor, accelerator.gather(kept[None])) for name, kept in memory.items()}


def own_memory(memories: Memory, rank: int, device: torch.device) -> Memory:
    """One process's part of `all_memories`; of more processes than there were, some begin with the same."""
    return {name: kept[rank % len(kept)].to(device) for name, kept in memories.items()}


def check_precisions(model: nn.Module, recipe: Recipe) -> None:
    """Makes sure that the model has every precision the schedule may draw, and float16 the levels of each.

    Raises:
        UsageError: it has not.
    """
    possible: Callable[[], tuple[Precision, ...]] | None = getattr(recipe.train.precision, "possible", None)
    drawn = precisions_or_all(model, None if possible is None else possible())
    most = max((p.act for p in drawn if not p.is_float), default=0)
    if recipe.train.amp == "fp16" and most > _FLOAT16_BITS:
        raise UsageError(
            f"train.amp=fp16 holds activations of up to {_FLOAT16_BITS} bit, and the precisions go up to {most}: "
            "give train.amp=bf16 or train.amp=no"
        )
    if recipe.train.float_epochs or recipe.train.regularizers:
        precisions_or_all(model, (FLOAT,))


def check_optimizer(section: OptimizerSection) -> OptimInfo:
    """What timm says of the optimizer, before any is made.

    Raises:
        UsageError: timm has no optimizer of that name.
    """
    try:
        return get_optimizer_info(section.name)
    except ValueError:
        hint = suggest(section.name, map(str, list_optimizers()))
        raise UsageError(f"timm has no optimizer {section.name!r}: {hint}") from None


def make_optimizer(model: nn.Module, section: OptimizerSection) -> torch.optim.Optimizer:
    """An optimizer by timm's name, with no weight decay on norms, biases and quantizer thresholds.

    Make it after the weights are loaded: loading replaces Brevitas's parameters.

    Raises:
        UsageError: timm has no optimizer of that name.
    """
    info = check_optimizer(section)
    adam_like = info.has_betas and not info.has_momentum and info.num_betas == 2
    extra: dict[str, Any] = {"betas": (section.momentum, 0.999)} if adam_like else {}
    return create_optimizer_v2(
        _groups(model, section),
        opt=section.name,
        lr=section.lr,
        weight_decay=section.weight_decay,
        momentum=section.momentum,
        **extra,
    )


def make_scheduler(optimizer: torch.optim.Optimizer, train: TrainSection, phase: TrainingPhase) -> Any:
    """A scheduler by timm over one phase, to be told the number of steps since the phase began after each step."""
    section = train.scheduler
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=section.name,
        num_epochs=phase.epochs,
        # A short float phase warms up for its first half at most.
        warmup_epochs=min(section.warmup_epochs, phase.epochs / 2),  # pyright: ignore[reportArgumentType]
        # Not 0, which would waste the first step.
        warmup_lr=_FIRST_LR * train.optimizer.lr,
        min_lr=section.min_lr,
        decay_epochs=section.decay_epochs,
        decay_rate=1.0 if section.name == "poly" else section.decay_rate,
        step_on_epochs=False,
        updates_per_epoch=phase.steps_per_epoch,
    )
    return scheduler


def _groups(model: nn.Module, section: OptimizerSection) -> list[dict[str, Any]]:
    """Weights, then parameters without weight decay, then thresholds, which have a learning rate factor too."""
    thresholds = {id(parameter) for parameter in quantizer_parameters(model)}
    weights: list[Tensor] = []
    without_decay: list[Tensor] = []
    own: list[Tensor] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            group = own if id(parameter) in thresholds else weights if parameter.ndim > 1 else without_decay
            group.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": weights},
        {"params": without_decay, "weight_decay": 0.0},
        # timm's schedulers multiply the learning rate by lr_scale. GIR's normalized gradient of a single number is its
        # sign: a threshold would take steps of one size, however flat the loss.
        {"params": own, "weight_decay": 0.0, "lr_scale": section.threshold_lr_scale, GIR_KEY: False},
    ]
    return [group for group in groups if group["params"]]
