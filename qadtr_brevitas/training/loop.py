"""The training loop: sample a precision, make inputs, forward, loss, backward, gradient rule, optimizer step, log.

Four independent choices of the recipe make a defense: precision schedule, attack, regularizers, gradient rule. A run
that was stopped at any moment goes on with the same command and ends with the same weights, bit for bit on the same
CPU, because everything random derives from (seed, step, rank); GPUs add some gradients in an order of their own.

Accuracy during training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from qadtr_brevitas.config import Recipe
from qadtr_brevitas.core.errors import TrainingError
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.core.seeding import derive_seed
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation.predict import predict
from qadtr_brevitas.pipeline.build import build_splits, build_switchable, fit_data, own_classes
from qadtr_brevitas.pipeline.calibration import calibrate_on, calibration_count
from qadtr_brevitas.pipeline.checkpoint import load_model, save_model
from qadtr_brevitas.quant import (
    SwitchableModel,
    allowed_precisions,
    at_precision,
    frozen_weights,
    recalibrate_norms,
    set_precision,
)
from qadtr_brevitas.quant.model_info import ModelInfo
from qadtr_brevitas.training.inputs import Inputs, NormBatches
from qadtr_brevitas.training.log import EpochRecord, RunLog, StepRecord, TrainingObserver
from qadtr_brevitas.training.setup import (
    FLOAT,
    TrainingPhase,
    all_memories,
    average_norm_statistics,
    check_agreement,
    check_optimizer,
    check_precisions,
    make_optimizer,
    make_scheduler,
    own_memory,
    parallel,
    plan,
    started_processes,
)
from qadtr_brevitas.training.state import (
    BEST_FOLDER,
    LAST_FOLDER,
    METRICS_FILE,
    TENSORBOARD_FOLDER,
    SavedState,
    TrainState,
    check_finite,
    open_run,
    save_state,
    start_run,
)
from qadtr_brevitas.training.stop import Interrupted, StopRequest


def accuracy_per_precision(
    model: SwitchableModel, split: Split, precisions: Sequence[Precision], accelerator: Accelerator
) -> dict[str, float]:
    """Share of images that are right at each precision, each process looking at its share of them.

    Args:
        model: left in training mode.
        split: the images.
        precisions: where to measure.
        accelerator: the processes.
    """
    own = split.subset(torch.arange(accelerator.process_index, len(split), accelerator.num_processes))
    right: list[Tensor] = []
    model.eval()
    with frozen_weights(model):
        for precision in precisions:
            with at_precision(model, precision):
                predicted = predict(model, own, device=accelerator.device)
            right.append((predicted == own.labels).sum())
    model.train()
    counts: Any = accelerator.reduce(torch.stack(right).to(accelerator.device), "sum")
    return {str(p): count / len(split) for p, count in zip(precisions, counts.tolist(), strict=True)}


def train(
    recipe: Recipe,
    output: str | Path,
    *,
    resume: Literal["auto", "never"] = "auto",
    overwrite: bool = False,
    observer: TrainingObserver | None = None,
    device: str = "auto",
) -> Path:
    """Trains a switchable model as a recipe says, and writes a run directory.

    Under torchrun, call it in every process. Norm statistics are those of each process's share of the batch, averaged
    over the processes after every step.

    Args:
        recipe: everything about the run.
        output: the run directory: `recipe.yaml` as resolved, `metrics.jsonl`, `tensorboard/`, `last/` (a model
            directory), `best/` (only with data.val_share above 0: the epoch with the best mean accuracy over
            precisions on held-out training images) and `state/`.
        resume: `auto` goes on where an earlier run of the same recipe in this directory stopped, and does nothing if
            it is finished; `never` refuses a directory that holds a run.
        overwrite: with `never`, deletes the run in the directory first.
        observer: is told about steps, epochs and messages.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.

    Returns:
        The run directory.

    Raises:
        UsageError: the directory holds another run, or not the same one for every process, or the recipe does not fit
            model, data or device.
        TrainingError: the loss is no longer finite; the last good state stays on disk.
        Interrupted: stopped by Ctrl-C or SIGTERM; the state is saved.
        CheckpointError: something cannot be written or read; what was written before stays.
    """
    run = Path(output)
    saved = open_run(run, recipe, resume=resume, overwrite=overwrite)
    observer = observer or TrainingObserver()
    finished = saved is not None and saved.state.finished
    has_model = (run / LAST_FOLDER).is_dir()
    with started_processes(recipe.train, device) as accelerator:
        # Before the first of them writes anything.
        check_agreement(run, (saved.state.step if saved else -1, finished, has_model), accelerator)
        if finished and has_model:
            observer.on_message(
                f"{run} is finished: nothing to do (another -o, or --resume never --overwrite, trains anew)"
            )
            return run
        trainer = _Trainer(recipe, run, accelerator, observer, saved)
        if finished:
            trainer.write_again()
        else:
            trainer.train()
    return run


class _Trainer:
    """One run in one process."""

    def __init__(
        self, recipe: Recipe, run: Path, accelerator: Accelerator, observer: TrainingObserver, saved: SavedState | None
    ) -> None:
        self.recipe, self.run, self.accelerator, self.saved = recipe, run, accelerator, saved
        self.is_main = accelerator.is_main_process
        self.observer = observer if self.is_main else TrainingObserver()
        self.rank, self.processes = accelerator.process_index, accelerator.num_processes
        self.device = accelerator.device
        self.state = saved.state if saved else TrainState()
        torch.manual_seed(derive_seed(recipe.seed, "build"))
        # The run's recipe stays as it was given: a resumed run is compared with it.
        fitted = fit_data(recipe)
        self.train_split, val, test = build_splits(fitted.data, seed=recipe.seed)
        self.held_out: Split = test if val is None else val
        self.split_name: Literal["val", "test"] = "test" if val is None else "val"
        self.phases = plan(recipe.train, len(self.train_split))
        if not all(precision.is_float for precision in recipe.quant.precisions):
            # Told now, and not after the float epochs.
            calibration_count(recipe.quant.calibration, len(self.train_split))
        model, self.info = build_switchable(fitted, self.train_split)
        check_precisions(model, recipe)
        check_optimizer(recipe.train.optimizer)
        if saved:
            # Before any optimizer exists: loading replaces Brevitas's parameters.
            model.load_state_dict(saved.model)
        # Convolutions of small images are about a fifth faster in this layout, on CPUs as on GPUs.
        self.model: SwitchableModel = model.to(self.device).to(memory_format=torch.channels_last)
        memory = own_memory(saved.memory, self.rank, self.device) if saved else {}
        self.inputs = Inputs(recipe, self.train_split, self.rank, self.processes, self.device, memory)
        self.log: RunLog | None = None
        self.request = StopRequest()
        # What all processes agreed on.
        self.stop = False

    def train(self) -> None:
        """Runs what is left of the run."""
        if self.is_main and self.saved is None:
            start_run(self.run, self.recipe)
        self.accelerator.wait_for_everyone()
        if self.saved:
            self._tell_resumed(self.saved)
            if self.saved.scaler and self.accelerator.scaler:
                self.accelerator.scaler.load_state_dict(self.saved.scaler)
        elif self.recipe.model.pretrained:
            self._tell_new_classifier()
        if self.is_main:
            self.log = RunLog(self.run / METRICS_FILE, self.run / TENSORBOARD_FOLDER, step=self.state.step)
        last = self.phases[-1]
        epochs = last.first_epoch + last.epochs
        self.observer.on_start(step=self.state.step, total_steps=last.end_step, epochs=epochs)
        try:
            with self.request:
                for phase in self.phases:
                    if self.state.step < phase.end_step:
                        self._train_phase(phase)
            self._finish(last)
        finally:
            if self.log:
                self.log.close()

    def write_again(self) -> None:
        """Writes the model of a finished run, which somebody has removed."""
        self._write_model(LAST_FOLDER, self.model)
        self.observer.on_message(f"{self.run} is finished: wrote its model {self.run / LAST_FOLDER} again")

    def _train_phase(self, phase: TrainingPhase) -> None:
        if phase.name == "quantized" and self.state.step == phase.first_step:
            calibrate_on(self.model, self.train_split, self.recipe.quant.calibration, seed=self.recipe.seed)
        optimizer = make_optimizer(self.model, self.recipe.train.optimizer)
        scheduler = make_scheduler(optimizer, self.recipe.train, phase)
        rule = None
        if phase.name == "quantized" and self.recipe.train.gradient is not None:
            rule = optimizer = self.recipe.train.gradient.wrap(optimizer, seed=self.recipe.seed)
        if self.saved and self.saved.phase == phase.name:
            optimizer.load_state_dict(self.saved.optimizer)
        prepared = self.accelerator.prepare_optimizer(optimizer)
        forward = parallel(self.model, self.accelerator)
        scheduler.step_update(self.state.step - phase.first_step)
        self.model.train()
        while self.state.step < phase.end_step:
            self._train_step(phase, forward, prepared, rule)
            scheduler.step_update(self.state.step - phase.first_step)
            if self.state.step % phase.steps_per_epoch == 0:
                self._end_epoch(phase)
                self._save(phase, optimizer)
            elif self.state.step % self.recipe.train.checkpoint_every == 0 or self.stop:
                self._save(phase, optimizer)
            if self.stop:
                raise Interrupted(
                    f"stopped after step {self.state.step}; the state is saved in {self.run}: the same command goes on"
                )

    def _train_step(self, phase: TrainingPhase, forward: nn.Module, optimizer: Any, rule: Any) -> None:
        """One optimizer step, at one precision or at several with their losses averaged."""
        started = time.perf_counter()
        recipe, step = self.recipe, self.state.step
        # For what draws from the global stream, such as dropout.
        torch.manual_seed(derive_seed(recipe.seed, "step", step, self.rank))
        precisions = phase.precisions(recipe, step)
        clean, labels = self.inputs.batch(step, steps_per_epoch=phase.steps_per_epoch)
        lr: float = optimizer.param_groups[0]["lr"]
        optimizer.zero_grad()
        loss, right, attacked = 0.0, torch.zeros_like(labels, dtype=torch.bool), 0
        for precision in precisions:
            set_precision(self.model, precision)
            images, attacked = clean, 0
            if phase.name == "quantized":
                with self._attack_precision():
                    images, attacked = self.inputs.attack(self.model, clean, labels, step=step, precision=precision)
            with self.accelerator.autocast():
                logits = forward(images)
                part = self._loss(logits, images, labels, precision)
            loss += self._agree_on(part, precision, lr) / len(precisions)
            self.accelerator.backward(part / len(precisions))
            right = logits.detach().argmax(dim=1) == labels
        if recipe.train.clip_grad_norm is not None:
            # Not the accelerator's clipping: it would unscale once more for the optimizer of the float epochs.
            self.accelerator.unscale_gradients(optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.train.clip_grad_norm)
        if rule is not None:
            rule.set_context(step=step, precision=min(precisions))
        optimizer.step()
        average_norm_statistics(self.model, self.accelerator)
        self.state.step += 1
        self._log_step(
            StepRecord(
                step=self.state.step,
                epoch=step // phase.steps_per_epoch,
                phase=phase.name,
                precision="+".join(str(precision) for precision in precisions),
                loss=loss,
                lr=lr,
                images_per_s=recipe.train.batch_size / (time.perf_counter() - started),
                accuracy=_share(right[attacked:]),
                adversarial_accuracy=_share(right[:attacked]),
                gir_cosine=None if rule is None else rule.last_cosine,
            )
        )

    def _attack_precision(self) -> AbstractContextManager[None]:
        """Autocast in bfloat16; in float16 unscaled gradients of images that are known well would be zero."""
        return nullcontext() if self.recipe.train.amp == "fp16" else self.accelerator.autocast()

    def _loss(self, logits: Tensor, images: Tensor, labels: Tensor, precision: Precision) -> Tensor:
        loss = cross_entropy(logits, labels, label_smoothing=self.recipe.train.label_smoothing)
        for regularizer in self.recipe.train.regularizers:
            extra = regularizer.loss(logits, images, teacher=self._teacher, precision=precision)
            loss = loss if extra is None else loss + extra
        return loss

    def _teacher(self, images: Tensor) -> Tensor:
        """Logits of the model at 32 bit, in eval mode, without gradients."""
        self.model.eval()
        with torch.no_grad(), at_precision(self.model, FLOAT):
            logits = self.model(images)
        self.model.train()
        return logits

    def _agree_on(self, loss: Tensor, precision: Precision, lr: float) -> float:
        """The mean loss of all processes; also lets all stop together, and stops at a loss that is not finite."""
        figures: Any = torch.stack([loss.detach().float(), loss.new_tensor(self.request.asked, dtype=torch.float32)])
        if self.processes > 1:
            figures = self.accelerator.reduce(figures, "mean")
        mean, stop = figures.tolist()
        self.stop = stop > 0
        if not math.isfinite(mean):
            raise TrainingError(
                f"the loss is {mean} at step {self.state.step} (precision {precision}, learning rate {lr:.3g}); the "
                f"last good state is kept in {self.run}. Try a lower train.optimizer.lr, or train.clip_grad_norm=1"
            )
        return mean

    def _end_epoch(self, phase: TrainingPhase) -> None:
        """Validates if it is due, logs the epoch and writes the models."""
        epoch = self.state.step // phase.steps_per_epoch - 1
        is_last = self.state.step == self.phases[-1].end_step
        accuracy = None
        if is_last or (epoch + 1) % self.recipe.train.validate_every == 0:
            precisions = (FLOAT,) if phase.name == "float" else allowed_precisions(self.model)
            accuracy = accuracy_per_precision(self.model, self.held_out, precisions, self.accelerator)
        best = False
        if accuracy and self.split_name == "val" and phase.name == "quantized":
            mean = sum(accuracy.values()) / len(accuracy)
            if best := self.state.best is None or mean > self.state.best:
                self.state.best = mean
        means = {name: total / count for name, (total, count) in self.state.sums.items()}
        self.state.sums.clear()
        check_finite(self.model, self.state.step)
        self._write_model(LAST_FOLDER, self.model)
        if best:
            self._write_model(BEST_FOLDER, self.model)
        self._log_epoch(phase, epoch, means=means, val_accuracy=accuracy, best=best)

    def _finish(self, last: TrainingPhase) -> None:
        """Recalibrates norm statistics, validates once more, and marks the run as finished."""
        batches = NormBatches(self.recipe, self.train_split, self.device)
        epoch = last.first_epoch + last.epochs - 1
        if len(batches):
            recalibrate_norms(self.model, batches)
            self._write_model(LAST_FOLDER, self.model)
            best = self.run / BEST_FOLDER
            if self.is_main and best.is_dir():
                model, _ = load_model(best, device=str(self.device))
                recalibrate_norms(model.to(memory_format=torch.channels_last), batches)
                self._write_model(BEST_FOLDER, model)
            precisions = allowed_precisions(self.model)
            accuracy = accuracy_per_precision(self.model, self.held_out, precisions, self.accelerator)
            self._log_epoch(last, epoch, kind="final", means={}, val_accuracy=accuracy)
        self.state.finished = True
        self._save(last, None)

    def _save(self, phase: TrainingPhase, optimizer: torch.optim.Optimizer | None) -> None:
        """Writes the training state, once all processes are here."""
        check_finite(self.model, self.state.step)
        self.accelerator.wait_for_everyone()
        memory = all_memories(self.inputs.memory, self.accelerator)
        if self.is_main:
            scaler = self.accelerator.scaler
            save_state(
                self.run,
                SavedState(
                    state=self.state,
                    phase=phase.name,
                    processes=self.processes,
                    model=self.model.state_dict(),
                    optimizer={} if optimizer is None else optimizer.state_dict(),
                    scaler=scaler.state_dict() if scaler else None,
                    memory=memory,
                ),
            )

    def _write_model(self, folder: str, model: SwitchableModel) -> None:
        if self.is_main:
            info: ModelInfo = self.info
            save_model(self.run / folder, model, info)

    def _log_step(self, record: StepRecord) -> None:
        for name in ("loss", "accuracy", "adversarial_accuracy", "gir_cosine", "images_per_s"):
            value = getattr(record, name)
            if value is not None:
                total, count = self.state.sums.get(name, (0.0, 0))
                self.state.sums[name] = [total + value, count + 1]
        if self.log:
            self.log.step(record)
        self.observer.on_step(record)

    def _log_epoch(self, phase: TrainingPhase, epoch: int, **figures: Any) -> None:
        record = EpochRecord(step=self.state.step, epoch=epoch, phase=phase.name, split=self.split_name, **figures)
        if self.log:
            self.log.epoch(record)
        self.observer.on_epoch(record)

    def _tell_new_classifier(self) -> None:
        own, count = own_classes(self.recipe.model), self.info.num_classes
        if own != count:
            self.observer.on_message(f"the classifier begins anew: for {count} classes, the weights are for {own}")

    def _tell_resumed(self, saved: SavedState) -> None:
        self.observer.on_message(f"going on in {self.run} after step {saved.state.step}")
        if saved.processes != self.processes:
            self.observer.on_message(
                f"the run was begun with {saved.processes} processes and goes on with {self.processes}: "
                "it will not equal an uninterrupted one exactly"
            )


def _share(right: Tensor) -> float | None:
    return right.float().mean().item() if len(right) else None
