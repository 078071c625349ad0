"""Validation: accuracy at each precision on images that training does not see, after epochs and at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor

from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.pipeline.checkpoint import load_model
from qadtr_brevitas.pipeline.directories import BEST_FOLDER, LAST_FOLDER
from qadtr_brevitas.quant import SwitchableModel, allowed_precisions, at_precision, frozen_weights, recalibrate_norms
from qadtr_brevitas.training.images import NormBatches
from qadtr_brevitas.training.log import EpochRecord
from qadtr_brevitas.training.phases import TrainingPhase
from qadtr_brevitas.training.run_writer import RunWriter
from qadtr_brevitas.training.state import check_finite
from qadtr_brevitas.training.step import FLOAT

if TYPE_CHECKING:
    from accelerate import Accelerator

_BATCH = 256


def accuracy_per_precision(
    model: SwitchableModel, split: Split, precisions: Sequence[Precision], accelerator: Accelerator
) -> dict[str, float]:
    """Return the share of correctly classified images at each precision; each process classifies its part of them.

    Args:
        model: afterwards it is in training mode.
        split: the images.
        precisions: the precisions to measure at.
        accelerator: the processes.
    """
    own = split.subset(torch.arange(accelerator.process_index, len(split), accelerator.num_processes))
    correct = torch.zeros(len(precisions), dtype=torch.int64, device=accelerator.device)
    model.eval()
    # Each batch is read once for all precisions. Not inference_mode: Brevitas's quantizers fail on its tensors.
    with frozen_weights(model), torch.no_grad():
        for _, images, labels in own.batches(_BATCH, device=accelerator.device):
            for place, precision in enumerate(precisions):
                with at_precision(model, precision):
                    correct[place] += (model(images).argmax(dim=1) == labels).sum()
    model.train()
    counts = cast(Tensor, accelerator.reduce(correct, "sum"))
    return {str(p): count / len(split) for p, count in zip(precisions, counts.tolist(), strict=True)}


class Validation:
    """Validates epochs and the finished model, chooses the best epoch, and writes models and epoch records.

    Args:
        model: the model in training.
        val: images held out of training, by which the best epoch is chosen; None to monitor on the test images.
        test: the test images.
        every: epochs between two validations.
        writer: of the run.
        accelerator: the processes.
    """

    def __init__(
        self,
        model: SwitchableModel,
        val: Split | None,
        test: Split,
        every: int,
        writer: RunWriter,
        accelerator: Accelerator,
    ) -> None:
        self._model, self._writer, self._accelerator, self._every = model, writer, accelerator, every
        self._split = test if val is None else val
        self._split_name: Literal["val", "test"] = "test" if val is None else "val"

    def end_epoch(self, phase: TrainingPhase, *, is_last: bool) -> None:
        """Validate if it is due, write the models and log the epoch."""
        counters = self._writer.counters
        epoch = counters.step // phase.steps_per_epoch - 1
        accuracy = None
        if is_last or (epoch + 1) % self._every == 0:
            accuracy = self._accuracy(allowed_precisions(self._model) if phase.is_quantized else (FLOAT,))
        best = False
        if accuracy and self._split_name == "val" and phase.is_quantized:
            mean = sum(accuracy.values()) / len(accuracy)
            if best := counters.best is None or mean > counters.best:
                counters.best = mean
        means = self._writer.pop_means()
        check_finite(self._model, counters.step)
        self._writer.save_model(LAST_FOLDER, self._model)
        if best:
            self._writer.save_model(BEST_FOLDER, self._model)
        self._log(phase, epoch, means, accuracy, best=best)

    def finish(self, last: TrainingPhase, batches: NormBatches) -> None:
        """Recalibrate the norm statistics of the last and the best model and validate once more.

        Args:
            last: the last phase.
            batches: images to recalibrate on; with none, nothing is done.
        """
        if not len(batches):
            return
        recalibrate_norms(self._model, batches)
        self._writer.save_model(LAST_FOLDER, self._model)
        best = self._writer.run / BEST_FOLDER
        if self._writer.is_main and best.is_dir():
            model, _ = load_model(best, device=str(self._accelerator.device))
            recalibrate_norms(model.to(memory_format=torch.channels_last), batches)
            self._writer.save_model(BEST_FOLDER, model)
        accuracy = self._accuracy(allowed_precisions(self._model))
        self._log(last, last.first_epoch + last.epochs - 1, {}, accuracy, kind="final")

    def _accuracy(self, precisions: Sequence[Precision]) -> dict[str, float]:
        return accuracy_per_precision(self._model, self._split, precisions, self._accelerator)

    def _log(
        self,
        phase: TrainingPhase,
        epoch: int,
        means: dict[str, float],
        accuracy: dict[str, float] | None,
        *,
        best: bool = False,
        kind: Literal["epoch", "final"] = "epoch",
    ) -> None:
        self._writer.log_epoch(
            EpochRecord(
                step=self._writer.counters.step,
                epoch=epoch,
                phase=phase.name,
                means=means,
                split=self._split_name,
                val_accuracy=accuracy,
                best=best,
                kind=kind,
            )
        )
