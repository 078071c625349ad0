"""What a run tells: one JSON line per step and epoch, TensorBoard where it is installed, and an observer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from qadtr_brevitas.core.errors import CheckpointError
from qadtr_brevitas.core.files import write_atomically

_TENSORBOARD_EVERY = 10


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step.

    Args:
        step: steps done, this one included.
        epoch: 0-based, over all phases.
        phase: `float` or `quantized`.
        precision: what the step trained; several are joined by +.
        loss: mean over the global batch.
        lr: learning rate of the weights.
        images_per_s: over all processes.
        accuracy: share of this process's images that were right and not attacked, in training mode; None if all were.
        adversarial_accuracy: the same of the attacked images; None if there were none.
        gir_cosine: cosine between raw and perturbed gradient; None for steps that were not perturbed.
    """

    step: int
    epoch: int
    phase: str
    precision: str
    loss: float
    lr: float
    images_per_s: float
    accuracy: float | None
    adversarial_accuracy: float | None
    gir_cosine: float | None
    kind: Literal["step"] = "step"


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One epoch, or (`kind` final) the finished model.

    Args:
        step: steps done.
        epoch: 0-based, over all phases.
        phase: `float` or `quantized`.
        means: mean over the epoch of each figure of its steps.
        split: what `val_accuracy` was measured on: `val`, images held out of training, or `test`, for monitoring only.
        val_accuracy: precision -> share of images that are right; None in epochs without a validation.
        best: this epoch is the best so far (only with held-out images).
    """

    step: int
    epoch: int
    phase: str
    means: dict[str, float]
    split: Literal["val", "test"]
    val_accuracy: dict[str, float] | None
    best: bool = False
    kind: Literal["epoch", "final"] = "epoch"


class TrainingObserver:
    """Told what a run does; override what is of interest. Called in the main process only."""

    def on_start(self, *, step: int, total_steps: int, epochs: int) -> None:
        """Training is about to go on from `step`."""

    def on_step(self, record: StepRecord) -> None:
        """A step is done."""

    def on_epoch(self, record: EpochRecord) -> None:
        """An epoch is done and validated, or the finished model is."""

    def on_message(self, message: str) -> None:
        """Something worth a line of talk."""


class RunLog:
    """Writes records to `metrics.jsonl` and, where TensorBoard is installed, to event files.

    Args:
        metrics: the JSON lines file; appended to.
        events: folder of the event files.
        step: lines and events of later steps are removed, so that a resumed run doubles none.

    Raises:
        CheckpointError: a file cannot be written.
    """

    def __init__(self, metrics: Path, events: Path, *, step: int) -> None:
        self._path = metrics
        _truncate(metrics, step)
        self._file = metrics.open("a", encoding="utf-8")
        self._events = _summary_writer(events, step)

    def step(self, record: StepRecord) -> None:
        """Logs a step."""
        self._write(asdict(record))
        if self._events and record.step % _TENSORBOARD_EVERY == 0:
            figures = {f"loss/{record.precision}": record.loss, "lr": record.lr, "images_per_s": record.images_per_s}
            self._scalars(figures, record.step)

    def epoch(self, record: EpochRecord) -> None:
        """Logs an epoch or the finished model."""
        self._write(asdict(record))
        if self._events:
            self._scalars({f"epoch/{name}": value for name, value in record.means.items()}, record.step)
            accuracies = record.val_accuracy or {}
            self._scalars({f"{record.split}_accuracy/{p}": value for p, value in accuracies.items()}, record.step)
            self._events.flush()

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._events:
            self._events.close()

    def _write(self, record: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            # A line a step is readable while the run goes on; nothing depends on it, so no fsync.
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self._path}: {error.strerror or error}; free some space, then give the same command"
            ) from error

    def _scalars(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self._events.add_scalar(name, value, step)


def last_epoch(metrics: Path) -> EpochRecord | None:
    """The last validated epoch, or the finished model, that a metrics file tells of; None if there is none."""
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    validated = [record for record in records if record["kind"] != "step" and record["val_accuracy"]]
    return EpochRecord(**validated[-1]) if validated else None


def _truncate(metrics: Path, step: int) -> None:
    """Drops lines after `step`, the line of a finish that was not recorded, and a line cut off by a crash."""
    if not metrics.is_file():
        metrics.parent.mkdir(parents=True, exist_ok=True)
        return
    lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = "".join(line for line in lines if _belongs(line, step))
    write_atomically(metrics, lambda path: path.write_text(kept, encoding="utf-8"))


def _belongs(line: str, step: int) -> bool:
    try:
        record = json.loads(line)
        return line.endswith("\n") and record["step"] <= step and record["kind"] != "final"
    except (ValueError, TypeError, KeyError):
        return False


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
