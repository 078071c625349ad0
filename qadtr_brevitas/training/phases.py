"""The phases of a run: float epochs, which train from scratch, and the quantized epochs after calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qadtr_brevitas.config import TrainSection
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.training.schedules import Schedule
from qadtr_brevitas.training.step import FLOAT


@dataclass(frozen=True)
class TrainingPhase:
    """Consecutive epochs with an optimizer and a learning rate curve of their own.

    Args:
        name: `float` before calibration, `quantized` after it.
        first_epoch: epochs before it.
        epochs: number of its epochs.
        steps_per_epoch: optimizer steps of an epoch.
    """

    name: Literal["float", "quantized"]
    first_epoch: int
    epochs: int
    steps_per_epoch: int

    @property
    def is_quantized(self) -> bool:
        """Whether the schedule, the attack, the objective and the gradient rule apply."""
        return self.name == "quantized"

    @property
    def first_step(self) -> int:
        """Steps before it."""
        return self.first_epoch * self.steps_per_epoch

    @property
    def end_step(self) -> int:
        """Steps up to its end."""
        return (self.first_epoch + self.epochs) * self.steps_per_epoch

    def precisions(self, schedule: Schedule, step: int, *, seed: int) -> tuple[Precision, ...]:
        """Return the precisions of a step: 32 bit in the float phase, else what the schedule draws."""
        if not self.is_quantized:
            return (FLOAT,)
        epoch = step // self.steps_per_epoch - self.first_epoch
        return schedule.precisions(step, seed=seed, epoch=epoch, epochs=self.epochs)

    def active(self, schedule: Schedule, step: int) -> tuple[Precision, ...]:
        """Return the precisions that the schedule draws from in the epoch of a step."""
        if not self.is_quantized:
            return (FLOAT,)
        return schedule.active(epoch=step // self.steps_per_epoch - self.first_epoch, epochs=self.epochs)


def plan_phases(train: TrainSection, images: int) -> list[TrainingPhase]:
    """Return the phases of a run over `images` training images; the last incomplete batch of an epoch is dropped.

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
