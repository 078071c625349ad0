"""The records of a run: one JSON line per step and epoch, TensorBoard where it is installed, and an observer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from qadtr_brevitas.core.errors import CheckpointError, PluginError
from qadtr_brevitas.core.files import write_atomically

_TENSORBOARD_EVERY = 10


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step.

    In `metrics.jsonl` the metrics stand beside the other keys.

    Args:
        step: steps done, this one included.
        epoch: 0-based, over all phases.
        phase: `float` or `quantized`.
        precision: the precision that the step trained; several are joined by +.
        loss: mean over the global batch.
        lr: learning rate of the weights.
        images_per_s: over all processes.
        metrics: figures that the objective, its regularizers and the gradient rule name; of several processes, those of
            the first, and of several precisions, those of the last. The ordinary loss names `accuracy`, the share of
            images without attack or masks that are classified correctly, `adversarial_accuracy`, that of attacked
            images without masks, and `masked_accuracy`, that of images under masks, all in training mode. GIR names
            `gir_cosine` on steps that it perturbs.
    """

    step: int
    epoch: int
    phase: str
    precision: str
    loss: float
    lr: float
    images_per_s: float
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    kind: Literal["step"] = "step"

    def as_json(self) -> dict[str, Any]:
        """Return the record as a line of `metrics.jsonl` holds it."""
        line = asdict(self)
        metrics, kind = line.pop("metrics"), line.pop("kind")
        return {**line, **metrics, "kind": kind}


_RESERVED = frozenset(facts.name for facts in fields(StepRecord))


def as_figures(metrics: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Return metrics as floats, without those that are not finite.

    Raises:
        PluginError: a metric has a name that the log uses itself, or is not a single number.
    """
    if taken := sorted(_RESERVED & metrics.keys()):
        raise PluginError(f"metric {taken[0]!r} has a name that the training log uses itself: choose another one")
    figures: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            raise PluginError(f"metric {name!r} has shape {tuple(value.shape)}: give a single number, as value.mean()")
        figures[name] = float(value.item() if isinstance(value, Tensor) else value)
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def mean_metrics(parts: Sequence[Mapping[str, float | Tensor]]) -> dict[str, float | Tensor]:
    """Return the mean of each metric over the parts of a batch that have it."""
    found: dict[str, list[float | Tensor]] = {}
    for part in parts:
        for name, value in part.items():
            found.setdefault(name, []).append(value)
    return {name: values[0] if len(values) == 1 else sum(values) / len(values) for name, values in found.items()}


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One epoch, or (`kind` final) the finished model.

    Args:
        step: steps done.
        epoch: 0-based, over all phases.
        phase: `float` or `quantized`.
        means: mean over the epoch of the loss, the speed and each metric, over the steps that have it.
        split: the images of `val_accuracy`: `val`, held out of training, or `test`, for monitoring only.
        val_accuracy: share of correctly classified images by precision; None in epochs without a validation.
        best: whether this epoch is the best so far (only with held-out images).
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
    """Follows a run; override the methods of interest. Called in the main process only."""

    def on_start(self, *, step: int, total_steps: int, epochs: int) -> None:
        """Handle the start of training after `step` steps that are done already."""

    def on_step(self, record: StepRecord) -> None:
        """Handle the end of a step."""

    def on_epoch(self, record: EpochRecord) -> None:
        """Handle the end of an epoch, after its validation, or of the run."""

    def on_message(self, message: str) -> None:
        """Handle a line of text for the user."""


class RunLog:
    """Appends records to `metrics.jsonl` and, where TensorBoard is installed, to event files.

    Args:
        metrics: the JSON lines file.
        events: folder of the event files.
        step: the step that the run resumes after; lines and events of later steps are deleted.

    Raises:
        CheckpointError: a file cannot be written.
    """

    def __init__(self, metrics: Path, events: Path, *, step: int) -> None:
        self._path = metrics
        _truncate(metrics, step)
        self._file = metrics.open("a", encoding="utf-8")
        self._events = _summary_writer(events, step)

    def step(self, record: StepRecord) -> None:
        """Log a step."""
        self._write(record.as_json())
        if self._events and record.step % _TENSORBOARD_EVERY == 0:
            by_precision = {"loss": record.loss, **record.metrics}
            figures = {f"{name}/{record.precision}": value for name, value in by_precision.items()}
            self._scalars({**figures, "lr": record.lr, "images_per_s": record.images_per_s}, record.step)

    def epoch(self, record: EpochRecord) -> None:
        """Log an epoch or the finished model."""
        self._write(asdict(record))
        if self._events:
            self._scalars({f"epoch/{name}": value for name, value in record.means.items()}, record.step)
            accuracies = record.val_accuracy or {}
            self._scalars({f"{record.split}_accuracy/{p}": value for p, value in accuracies.items()}, record.step)
            self._events.flush()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._events:
            self._events.close()

    def _write(self, record: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            # Readable while the run is under way. Nothing depends on the line, so no fsync.
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self._path}: {error.strerror or error}; free some space and give the same command again"
            ) from error

    def _scalars(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self._events.add_scalar(name, value, step)


def last_epoch(metrics: Path) -> EpochRecord | None:
    """Return the record of the last validated epoch, or of the finished model; None if there is none."""
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    validated = [record for record in records if record["kind"] != "step" and record["val_accuracy"]]
    return EpochRecord(**validated[-1]) if validated else None


def _truncate(metrics: Path, step: int) -> None:
    """Delete lines after `step`, the line of a finished model, and a line that a crash cut off."""
    if not metrics.is_file():
        metrics.parent.mkdir(parents=True, exist_ok=True)
        return
    lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = "".join(line for line in lines if _is_kept(line, step))
    write_atomically(metrics, lambda path: path.write_text(kept, encoding="utf-8"))


def _is_kept(line: str, step: int) -> bool:
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
