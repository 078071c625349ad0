"""Objectives: what a training step minimizes.

An objective is a plug-in. It computes one loss for one batch at one precision, from whatever a `TrainingStep` offers.
The float epochs before calibration minimize the ordinary loss, whatever the objective.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qadtr_brevitas.core.plugin import plugin
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.training.regularizers import Regularizer
from qadtr_brevitas.training.step import ForwardOutput, StepLoss, TrainingStep


class Objective(ABC):
    """An objective plug-in: what a training step minimizes."""

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """The precisions that it runs the model at besides that of the step; the model must have them."""
        return ()

    @abstractmethod
    def compute(self, step: TrainingStep) -> StepLoss:
        """Return the loss of one batch at one precision, and metrics.

        Called once for each precision of an optimizer step; the losses are averaged. Under torchrun it runs inside
        the forward pass of DistributedDataParallel, so that gradients of any number of forward passes are averaged.

        Args:
            step: the batch, its adversarial images, and forward passes at any precision.
        """


@plugin
class CrossEntropy(Objective):
    """The ordinary loss: cross-entropy with `train.label_smoothing`, and `train.regularizers`, on attacked images."""

    def compute(self, step: TrainingStep) -> StepLoss:
        """Return `step.default_loss()`; see `Objective.compute`."""
        return step.default_loss()


def ordinary_loss(
    step: TrainingStep, output: ForwardOutput, *, label_smoothing: float, regularizers: Sequence[Regularizer]
) -> StepLoss:
    """Return cross-entropy plus regularizers, and accuracies on images as they are, attacked, and under masks.

    Args:
        step: the batch.
        output: of a forward pass on `step.adversarial.images`.
        label_smoothing: in [0, 1).
        regularizers: their losses are added.
    """
    targets = step.labels if step.targets is None else step.targets.to(output.logits.dtype)
    loss = cross_entropy(output.logits, targets, label_smoothing=label_smoothing)
    metrics = _accuracies(step, output.logits)
    for regularizer in regularizers:
        extra = regularizer.compute(step, output)
        if extra is not None:
            loss = loss + extra.loss
            metrics |= extra.metrics
    return StepLoss(loss, metrics)


def _accuracies(step: TrainingStep, logits: Tensor) -> dict[str, float | Tensor]:
    """Return the shares of correctly classified images, in training mode, as far as there are such images."""
    correct = (logits.detach().argmax(dim=1) == step.labels).float()
    attacked = torch.arange(len(correct), device=correct.device) < step.adversarial.attacked
    masked = step.adversarial.masked
    if masked is None:
        masked = torch.zeros_like(attacked)
    parts = {
        "accuracy": correct[~attacked & ~masked],
        "adversarial_accuracy": correct[attacked & ~masked],
        "masked_accuracy": correct[masked],
    }
    return {name: part.mean() for name, part in parts.items() if len(part)}
