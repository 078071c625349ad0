"""The training loop: sample precisions, make inputs, objective, backward, gradient rule, optimizer step, log.

Independent choices of the recipe make a defense: precision schedule, attack, masks, objective, regularizers, gradient
rule.
The same command resumes a run that was interrupted at any moment, and ends with the same weights, bit for bit on the
same CPU, because everything random derives from (seed, step, rank); GPUs add some gradients in an order of their own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from qadtr_brevitas.config import Recipe
from qadtr_brevitas.core.errors import DataError, TrainingError
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.core.seeding import derive_seed
from qadtr_brevitas.pipeline.build import build_splits, build_switchable, fit_data
from qadtr_brevitas.pipeline.calibration import calibrate_on, calibration_count
from qadtr_brevitas.pipeline.directories import LAST_FOLDER
from qadtr_brevitas.quant import SwitchableModel, set_precision
from qadtr_brevitas.quant.fused import fused_on_cpu
from qadtr_brevitas.training.alrs import adapt_learning_rates
from qadtr_brevitas.training.compiled import compile_run
from qadtr_brevitas.training.gradient_rules import GradientRuleOptimizer
from qadtr_brevitas.training.images import ImageBatch, ImageSource, NormBatches
from qadtr_brevitas.training.inputs import TrainingInputs, make_step
from qadtr_brevitas.training.log import StepRecord, TrainingObserver, as_figures, mean_metrics
from qadtr_brevitas.training.masks import TrainingMasks
from qadtr_brevitas.training.messages import start_messages
from qadtr_brevitas.training.objectives import CrossEntropy
from qadtr_brevitas.training.phases import TrainingPhase, plan_phases
from qadtr_brevitas.training.processes import (
    LossForward,
    average_norm_statistics,
    averaged_gradients,
    check_agreement,
    gather_memory,
    memory_of_rank,
    replicate,
    started_processes,
)
from qadtr_brevitas.training.run_writer import RunWriter
from qadtr_brevitas.training.setup import check_optimizer, check_precisions, make_optimizer, make_scheduler
from qadtr_brevitas.training.state import RunCounters, TrainingState, check_finite, open_run
from qadtr_brevitas.training.step import EarlierPass, TrainingStep
from qadtr_brevitas.training.stop import Interrupted, StopRequest
from qadtr_brevitas.training.validation import Validation

if TYPE_CHECKING:
    from accelerate import Accelerator


def train(
    recipe: Recipe,
    output: str | Path,
    *,
    resume: Literal["auto", "never"] = "auto",
    overwrite: bool = False,
    observer: TrainingObserver | None = None,
    device: str = "auto",
    check: Callable[[SwitchableModel], object] | None = None,
) -> Path:
    """Train a switchable model by a recipe and write a run directory.

    Under torchrun, call it in every process. Norm statistics are those of each process's share of the batch, averaged
    over the processes after every step.

    Args:
        recipe: everything about the run.
        output: the run directory: `recipe.yaml` as resolved, `metrics.jsonl`, `tensorboard/`, `last/` (a model
            directory), `best/` (only with data.val_share above 0: the epoch with the best mean accuracy over
            precisions on held-out training images) and `state/`.
        resume: `auto` resumes an interrupted run of the same recipe in this directory, and does nothing if it is
            finished; `never` refuses a directory that holds a run.
        overwrite: with `never`, delete the run in the directory first.
        observer: follows steps, epochs and messages.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        check: raises an error for a converted network that is not worth training, before a run starts or goes on.

    Returns:
        The run directory.

    Raises:
        UsageError: the directory holds another run, or not the same one for every process, or the recipe does not fit
            model, data or device.
        TrainingError: the loss is not finite, or another process has ended; the last good state stays on disk.
        Interrupted: Ctrl-C or SIGTERM arrived; the state is saved.
        PluginError: the objective returns no loss that can be minimized.
        CheckpointError: something cannot be written or read; what was written before stays.
    """
    run = Path(output)
    saved = open_run(run, recipe, resume=resume, overwrite=overwrite)
    observer = observer or TrainingObserver()
    finished = saved is not None and saved.counters.finished
    has_model = (run / LAST_FOLDER).is_dir()
    with started_processes(recipe.train, device) as accelerator:
        # Before the first of them writes anything.
        check_agreement(run, (saved.counters.step if saved else -1, finished, has_model), accelerator)
        if finished and has_model:
            observer.on_message(
                f"{run} is finished, there is nothing to do: to train again, choose another folder with -o, "
                "or give --resume never --overwrite"
            )
            return run
        trainer = _Trainer(recipe, run, accelerator, observer, saved, check)
        if finished:
            trainer.restore_model()
        else:
            trainer.train()
    return run


class _Trainer:
    """One run in one process."""

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        accelerator: Accelerator,
        observer: TrainingObserver,
        saved: TrainingState | None,
        check: Callable[[SwitchableModel], object] | None,
    ) -> None:
        self.recipe, self.accelerator, self.saved = recipe, accelerator, saved
        self.rank, self.processes = accelerator.process_index, accelerator.num_processes
        self.device = accelerator.device
        self.counters = saved.counters if saved else RunCounters()
        report = observer.on_message if accelerator.is_main_process and not saved else None
        torch.manual_seed(derive_seed(recipe.seed, "build"))
        # The run's own recipe stays as it was given: a resumed run is compared with it.
        fitted = fit_data(recipe, report=report)
        self.train_split, val, test = build_splits(fitted.data, seed=recipe.seed)
        self.phases = plan_phases(recipe.train, len(self.train_split))
        if not all(precision.is_float for precision in recipe.quant.precisions):
            # Too few images are reported here, and not after the float epochs.
            calibration_count(recipe.quant.calibration, len(self.train_split))
        model, self.info = build_switchable(fitted, self.train_split, new_head=True, report=report)
        check_precisions(model, recipe)
        check_optimizer(recipe.train.optimizer)
        if check is not None and not self.counters.finished:
            with torch.random.fork_rng(devices=[]):
                check(model)
        if saved:
            # Before any optimizer exists: loading replaces Brevitas's parameters.
            model.load_state_dict(saved.model)
        # Convolutions of small images are about a fifth faster in this layout, on CPUs and on GPUs.
        self.model: SwitchableModel = model.to(self.device).to(memory_format=torch.channels_last)
        memory = memory_of_rank(saved.memory, self.rank, self.device) if saved else {}
        masks = TrainingMasks.of(recipe, self.train_split.image_size, mean=self.info.mean, device=self.device)
        self.source = ImageSource(recipe, self.train_split, self.rank, self.processes, self.device)
        count = recipe.train.accumulate
        # Each part of an accumulated batch is what one of so many processes would compute.
        self.inputs = [
            TrainingInputs(recipe, self.rank + self.processes * part, self.processes * count, masks, memory)
            for part in range(count)
        ]
        self.writer = RunWriter(run, self.counters, self.info, observer, is_main=accelerator.is_main_process)
        self.compiled = compile_run(self.model, recipe.train, report=self.writer.message)
        self.loss_forward = LossForward(self.model)
        self.validation = Validation(self.model, val, test, recipe.train.validate_every, self.writer, accelerator)
        self.stop_request = StopRequest()
        # Whether the processes agreed to stop.
        self.stop = False

    def train(self) -> None:
        """Train from the saved state, or from the start, to the end."""
        if self.saved is None:
            self.writer.start(self.recipe)
        self.accelerator.wait_for_everyone()
        run = self.writer.run
        for message in start_messages(
            run, self.recipe, self.info, self.saved, processes=self.processes, device=self.device
        ):
            self.writer.message(message)
        if self.saved and self.saved.scaler and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(self.saved.scaler)
        last = self.phases[-1]
        self.writer.open_log(total_steps=last.end_step, epochs=last.first_epoch + last.epochs)
        try:
            fused = fused_on_cpu() if self.recipe.train.compile == "quantizers" else nullcontext()
            with self.stop_request, fused:
                for phase in self.phases:
                    if self.counters.step < phase.end_step:
                        self._train_phase(phase)
            self.validation.finish(last, NormBatches(self.recipe, self.source))
            self.counters.finished = True
            self._save(last, None)
        finally:
            self.source.close()
            self.writer.close_log()

    def restore_model(self) -> None:
        """Write the model of a finished run whose model directory was deleted."""
        self.writer.save_model(LAST_FOLDER, self.model)
        self.writer.message(f"{self.writer.run} is finished: wrote its model {self.writer.run / LAST_FOLDER} again")

    def _train_phase(self, phase: TrainingPhase) -> None:
        if phase.is_quantized and self.counters.step == phase.first_step:
            calibrate_on(self.model, self.train_split, self.recipe.quant.calibration, seed=self.recipe.seed)
        optimizer = make_optimizer(self.model, self.recipe.train.optimizer)
        scheduler = make_scheduler(optimizer, self.recipe.train, phase)
        rule = None
        if phase.is_quantized and self.recipe.train.gradient is not None:
            rule = optimizer = self.recipe.train.gradient.wrap(optimizer, seed=self.recipe.seed)
        if self.saved and self.saved.phase == phase.name:
            optimizer.load_state_dict(self.saved.optimizer)
        prepared = self.accelerator.prepare_optimizer(optimizer)
        forward = replicate(self.loss_forward, self.accelerator)
        scheduler.step_update(self.counters.step - phase.first_step)
        self.model.train()
        while self.counters.step < phase.end_step:
            self._train_step(phase, forward, prepared, rule)
            scheduler.step_update(self.counters.step - phase.first_step)
            if self.counters.step % phase.steps_per_epoch == 0:
                self.validation.end_epoch(phase, is_last=self.counters.step == self.phases[-1].end_step)
                self._save(phase, optimizer)
            elif self.counters.step % self.recipe.train.checkpoint_every == 0 or self.stop:
                self._save(phase, optimizer)
            if self.stop:
                raise Interrupted(
                    f"stopped after step {self.counters.step} with the state saved in {self.writer.run}: "
                    "give the same command again to resume"
                )

    def _train_step(
        self,
        phase: TrainingPhase,
        forward: nn.Module,
        optimizer: torch.optim.Optimizer,
        rule: GradientRuleOptimizer | None,
    ) -> None:
        """Take one step, at one precision or at several: one update by their mean loss, or one after each."""
        started = time.perf_counter()
        batch = self._next_batch(phase, optimizer)
        train, number = self.recipe.train, self.counters.step
        # For layers that draw from the global stream, such as dropout.
        torch.manual_seed(derive_seed(self.recipe.seed, "step", number, self.rank))
        precisions = phase.precisions(train.precision, number, seed=self.recipe.seed)
        lr: float = optimizer.param_groups[0]["lr"]
        parts = batch.parts(train.accumulate)
        losses: list[float] = []
        metrics: list[Mapping[str, float | Tensor]] = []
        earlier: list[EarlierPass | None] = [None] * len(parts)
        updates = [(precision,) for precision in precisions] if train.update == "each" else [precisions]
        for index, together in enumerate(updates):
            optimizer.zero_grad()
            passes = len(together) * len(parts)
            for turn, precision in enumerate(together):
                set_precision(self.model, precision)
                metrics.clear()
                for place, part in enumerate(parts):
                    step = self._step_of(phase, place, part, precision, earlier[place])
                    is_last = turn * len(parts) + place == passes - 1
                    losses.append(self._backward(phase, forward, step, lr=lr, passes=passes, is_last=is_last))
                    earlier[place] = step.passed
                    metrics.append(self.loss_forward.metrics)
            if rule is not None:
                rule.set_context(step=number * len(updates) + index, precision=min(together))
            self._update(optimizer)
        average_norm_statistics(self.model, self.accelerator)
        self.counters.step += 1
        self.writer.log_step(
            StepRecord(
                step=self.counters.step,
                epoch=number // phase.steps_per_epoch,
                phase=phase.name,
                precision="+".join(map(str, precisions)),
                loss=sum(losses) / len(losses),
                lr=lr,
                images_per_s=train.batch_size / (time.perf_counter() - started),
                metrics=as_figures({**mean_metrics(metrics), **(rule.metrics() if rule else {})}),
            )
        )

    def _step_of(
        self, phase: TrainingPhase, place: int, part: ImageBatch, precision: Precision, earlier: EarlierPass | None
    ) -> TrainingStep:
        """Return what an objective sees of one part of the batch at one precision."""
        return make_step(
            self.inputs[place],
            self.accelerator,
            self.model,
            part.images,
            part.labels,
            self.counters.step,
            precision,
            attacked=phase.is_quantized,
            compiled=self.compiled,
            active=phase.active(self.recipe.train.precision, self.counters.step),
            earlier=earlier,
            targets=part.targets,
        )

    def _backward(
        self, phase: TrainingPhase, forward: nn.Module, step: TrainingStep, *, lr: float, passes: int, is_last: bool
    ) -> float:
        """Add the gradients of one of so many passes of an update; return its loss, the mean over the processes."""
        objective = self.recipe.train.objective if phase.is_quantized else CrossEntropy()
        with averaged_gradients(forward, at_once=is_last):
            with self.accelerator.autocast():
                loss: Tensor = forward(objective, step)
            mean = self._agree_on(loss, step.precision, lr)
            self.accelerator.backward(loss / passes)
        return mean

    def _next_batch(self, phase: TrainingPhase, optimizer: torch.optim.Optimizer) -> ImageBatch:
        """Return the images of the next step; where they cannot be read, save what was trained.

        Raises:
            DataError: an image cannot be read, or a process that reads them was killed.
        """
        step = self.counters.step
        try:
            return self.source.batch(step)
        except DataError as error:
            # Other processes do not know, and would be waited for; calibration comes again after the state before it.
            if self.processes > 1 or step == phase.first_step:
                raise
            self._save(phase, optimizer)
            raise DataError(
                f"{error}. The state after step {step} is saved in {self.writer.run}: the same command goes on from it"
            ) from error

    def _update(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer use the gradients."""
        train = self.recipe.train
        adapts = train.optimizer.threshold_rule == "alrs"
        if adapts or train.clip_grad_norm is not None:
            # Not the accelerator's clipping: it would unscale once more for the optimizer of the float epochs.
            self.accelerator.unscale_gradients(optimizer)
        if train.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), train.clip_grad_norm)
        if adapts:
            adapt_learning_rates(optimizer)
        optimizer.step()

    def _agree_on(self, loss: Tensor, precision: Precision, lr: float) -> float:
        """Return the mean loss of all processes, and note whether one of them is to stop.

        Raises:
            TrainingError: the loss is not finite.
        """
        stop = loss.new_tensor(self.stop_request.requested, dtype=torch.float32)
        figures = torch.stack([loss.detach().float(), stop])
        if self.processes > 1:
            figures = cast(Tensor, self.accelerator.reduce(figures, "mean"))
        mean, stopping = figures.tolist()
        self.stop = stopping > 0
        if not math.isfinite(mean):
            raise TrainingError(
                f"the loss is {mean} at step {self.counters.step} (precision {precision}, learning rate {lr:.3g}); the "
                f"last good state is kept in {self.writer.run}. Try a lower train.optimizer.lr, or "
                "train.clip_grad_norm=1"
            )
        return mean

    def _save(self, phase: TrainingPhase, optimizer: torch.optim.Optimizer | None) -> None:
        """Write the training state, once all processes are here."""
        check_finite(self.model, self.counters.step)
        self.accelerator.wait_for_everyone()
        scaler = self.accelerator.scaler
        self.writer.save_state(
            TrainingState(
                counters=self.counters,
                phase=phase.name,
                processes=self.processes,
                model=self.model.state_dict(),
                optimizer={} if optimizer is None else optimizer.state_dict(),
                scaler=scaler.state_dict() if scaler else None,
                memory=gather_memory(self.inputs[0].memory, self.accelerator),
            )
        )
