"""Regularizers: extra losses that are added to the cross-entropy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated

from torch.nn.functional import kl_div, log_softmax

from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.training.step import FLOAT, ForwardOutput, StepLoss, TrainingStep


class Regularizer(ABC):
    """A regularizer plug-in: an extra loss of the training step."""

    @property
    def features(self) -> tuple[str, ...]:
        """Patterns of the module names whose outputs `compute` finds in `output.features`."""
        return ()

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """The precisions that it runs the model at besides that of the step; the model must have them."""
        return ()

    @abstractmethod
    def compute(self, step: TrainingStep, output: ForwardOutput) -> StepLoss | None:
        """Return what is added to the loss, with metrics, or None where there is nothing to add.

        Args:
            step: the batch, and further forward passes at any precision.
            output: logits and `features` of the forward pass on `step.adversarial.images`, in training mode.
        """


@plugin
class Distillation(Regularizer):
    """Match the softened outputs of the same weights at 32 bit (Hinton et al. 2015), on steps below 32 bit.

    The teacher moves with the student, and a strong pull lets both drift. The loss grows with the square of the
    temperature: on CIFAR-10, ResNet-20, lr 0.04, weight 0.5 at temperature 4 diverges within 60 steps.
    """

    weight: Annotated[float, Field(ge=0, description="factor of the extra loss")] = 0.5
    temperature: Annotated[float, Field(gt=0, description="softens teacher and student")] = 1.0

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """32 bit, for the teacher."""
        return (FLOAT,)

    def compute(self, step: TrainingStep, output: ForwardOutput) -> StepLoss | None:
        """Return weight * T^2 * KL(teacher / T || student / T), the mean over the images, also as a metric."""
        if step.precision.is_float:
            return None
        teacher = step.teacher(step.adversarial.images).logits
        target = log_softmax(teacher / self.temperature, dim=1)
        student = log_softmax(output.logits / self.temperature, dim=1)
        divergence = kl_div(student, target, log_target=True, reduction="batchmean")
        loss = self.weight * self.temperature**2 * divergence
        return StepLoss(loss, {"distillation": loss.detach()})
