"""Everything that a run writes: records, training state and model directories. Only the main process writes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from qadtr_brevitas.config import Recipe
from qadtr_brevitas.pipeline.checkpoint import ModelInfo, save_model
from qadtr_brevitas.pipeline.directories import METRICS_FILE, TENSORBOARD_FOLDER
from qadtr_brevitas.quant import SwitchableModel
from qadtr_brevitas.training.log import EpochRecord, RunLog, StepRecord, TrainingObserver
from qadtr_brevitas.training.state import (
    RunCounters,
    TrainingState,
    save_state,
    start_run,
)


class RunWriter:
    """Writes into a run directory, and tells the observer.

    Args:
        run: the run directory.
        counters: how far the run has come; the sums of the epoch under way are kept in them.
        info: what the model is made of.
        observer: follows the run.
        is_main: whether this process writes; the others only keep counters.
    """

    def __init__(
        self, run: Path, counters: RunCounters, info: ModelInfo, observer: TrainingObserver, *, is_main: bool
    ) -> None:
        self.run, self.counters, self.is_main = run, counters, is_main
        self._info = info
        self._observer = observer if is_main else TrainingObserver()
        self._log: RunLog | None = None

    def start(self, recipe: Recipe) -> None:
        """Empty the run directory of an earlier run and write the recipe."""
        if self.is_main:
            start_run(self.run, recipe)

    def open_log(self, *, total_steps: int, epochs: int) -> None:
        """Open the log after the last step that is done."""
        if self.is_main:
            self._log = RunLog(self.run / METRICS_FILE, self.run / TENSORBOARD_FOLDER, step=self.counters.step)
        self._observer.on_start(step=self.counters.step, total_steps=total_steps, epochs=epochs)

    def close_log(self) -> None:
        """Close the log, if it is open."""
        if self._log:
            self._log.close()

    def message(self, text: str) -> None:
        """Show the user a line of text."""
        self._observer.on_message(text)

    def log_step(self, record: StepRecord) -> None:
        """Log a step and add its figures to those of the epoch."""
        for name, value in {"loss": record.loss, **record.metrics, "images_per_s": record.images_per_s}.items():
            total, count = self.counters.sums.get(name, (0.0, 0))
            self.counters.sums[name] = [total + value, count + 1]
        if self._log:
            self._log.step(record)
        self._observer.on_step(record)

    def pop_means(self) -> dict[str, float]:
        """Return the mean of each figure since the epoch began, and begin a new one."""
        means = {name: total / count for name, (total, count) in self.counters.sums.items()}
        self.counters.sums.clear()
        return means

    def log_epoch(self, record: EpochRecord) -> None:
        """Log an epoch or the finished model."""
        if self._log:
            self._log.epoch(record)
        self._observer.on_epoch(record)

    def save_state(self, state: TrainingState) -> None:
        """Write the training state."""
        if self.is_main:
            save_state(self.run, state)

    def save_model(self, folder: Literal["last", "best"], model: SwitchableModel) -> None:
        """Write a model directory inside the run directory."""
        if self.is_main:
            save_model(self.run / folder, model, self._info)
