"""Regularizers: extra losses that are added to the cross-entropy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Literal

from torch import Tensor
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

    `teacher: chain` matches those of the precision that the same step trained before instead, from high to random to
    low (EQ-Net, Xu et al., ICCV 2023; it weighs cross-entropy and distillation equally, as weight=1 does). That needs a
    schedule of several precisions a step, as `sandwich`. It costs no forward pass, unless images are attacked or
    masked: these are others at each precision, so the teacher has to see them too.

    The teacher moves with the student, and a strong pull lets both drift. The loss grows with the square of the
    temperature: on CIFAR-10, ResNet-20, lr 0.04, weight 0.5 at temperature 4 diverges within 60 steps.
    """

    weight: Annotated[float, Field(ge=0, description="factor of the extra loss")] = 0.5
    temperature: Annotated[float, Field(gt=0, description="softens teacher and student")] = 1.0
    teacher: Annotated[
        Literal["float", "chain"], Field(description="32 bit, or the precision that the step trained before")
    ] = "float"

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """32 bit, for the teacher; none in a chain, whose teachers are trained in the step itself."""
        return (FLOAT,) if self.teacher == "float" else ()

    def compute(self, step: TrainingStep, output: ForwardOutput) -> StepLoss | None:
        """Return weight * T^2 * KL(teacher / T || student / T), the mean over the images, also as a metric."""
        teacher = self._teacher(step)
        if teacher is None:
            return None
        target = log_softmax(teacher / self.temperature, dim=1)
        student = log_softmax(output.logits / self.temperature, dim=1)
        divergence = kl_div(student, target, log_target=True, reduction="batchmean")
        loss = self.weight * self.temperature**2 * divergence
        return StepLoss(loss, {"distillation": loss.detach()})

    def _teacher(self, step: TrainingStep) -> Tensor | None:
        """Return the logits to match (N, classes); None for a precision without a teacher."""
        if self.teacher == "chain":
            return step.earlier_logits()
        return None if step.precision.is_float else step.teacher(step.adversarial.images).logits
