"""What `train` shows of a running training: a progress bar, lines and tables of accuracy per epoch."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.table import Table

from qadtr_brevitas.cli.common import is_quiet, say, stderr
from qadtr_brevitas.core.progress import Progress, format_seconds
from qadtr_brevitas.training.log import EpochRecord, StepRecord, TrainingObserver

# The time left is told once, after so many steps beyond the first ones, which are slower than others.
_WARM_UP, _TIMED = 3, 20


class TrainingProgress(TrainingObserver):
    """Shows progress and tables on a terminal, and one line per epoch off it, all on stderr.

    Attributes:
        total_steps: steps of the training; 0 before it starts, and if the run was finished already.
        epochs: epochs of the training.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._console = stderr()
        self.total_steps = self.epochs = 0
        self._steps, self._since = 0, 0.0

    def on_start(self, *, step: int, total_steps: int, epochs: int) -> None:
        self.total_steps, self.epochs = total_steps, epochs
        self._progress(step, total_steps)

    def on_step(self, record: StepRecord) -> None:
        note = f"epoch {record.epoch + 1}/{self.epochs} loss {record.loss:.3f} {record.images_per_s:.0f} images/s"
        self._progress(record.step, self.total_steps, note)
        self._tell_time(self.total_steps - record.step)

    def _tell_time(self, left: int) -> None:
        """Say how long the training will take, once and in logs too, if it will take a while."""
        self._steps += 1
        if self._steps == _WARM_UP:
            self._since = time.monotonic()
        if self._steps == _WARM_UP + _TIMED and left > 2 * _TIMED:
            seconds = (time.monotonic() - self._since) / _TIMED * left
            say(f"{left} steps are left, about {format_seconds(seconds)} at the speed of the first {_TIMED}")

    def on_epoch(self, record: EpochRecord) -> None:
        if is_quiet():
            return
        if not self._console.is_terminal:
            say(epoch_line(record, self.epochs))
        # The table of the finished model is the result of the command.
        elif record.val_accuracy and record.kind != "final":
            self._console.print(accuracy_table(record))

    def on_message(self, message: str) -> None:
        say(message)


def accuracy_table(record: EpochRecord) -> Table:
    """Return a table of the accuracy per precision of one validation, with the metrics of the epoch below."""
    from rich.table import Table

    accuracy = record.val_accuracy or {}
    caption = ", ".join(_metrics(record.means)) or None
    table = Table(f"accuracy (%) on {record.split} images, at", *accuracy, caption=caption)
    table.add_row(_when(record), *(f"{100 * value:.2f}" for value in accuracy.values()))
    return table


def _when(record: EpochRecord) -> str:
    return "finished model" if record.kind == "final" else f"epoch {record.epoch + 1}"


def epoch_line(record: EpochRecord, epochs: int) -> str:
    """Return an epoch as a line of plain text."""
    means = record.means
    head = _when(record) if record.kind == "final" else f"{_when(record)}/{epochs} ({record.phase})"
    parts = [f"loss {means['loss']:.4f}, {means['images_per_s']:.0f} images/s"] if means else []
    parts += _metrics(means)
    if record.val_accuracy:
        figures = ", ".join(f"{p}: {100 * value:.2f}" for p, value in record.val_accuracy.items())
        parts.append(f"{record.split} accuracy (%) at {figures}")
    return f"{head}: {'; '.join(parts)}"


def _metrics(means: Mapping[str, float]) -> list[str]:
    """Return the figures that objective, regularizers and gradient rule name, as words."""
    shown = {name: value for name, value in means.items() if name not in ("loss", "images_per_s")}
    return [f"{name.replace('_', ' ')} {value:.3f}" for name, value in shown.items()]
