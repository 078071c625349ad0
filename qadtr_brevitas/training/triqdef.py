"""TriQDef: an objective that makes features and input gradients of different precisions unlike each other."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.training.objectives import Objective
from qadtr_brevitas.training.step import ForwardOutput, StepLoss, TrainingStep
from qadtr_brevitas.training.structure import structural_similarity


@plugin
class TriQDef(Objective):
    """The ordinary loss and the likeness of two precisions on adversarial images (Guesmi et al., arXiv 2508.12132).

    loss = ordinary + `feature` * FDP + `gradient` * GPDP. FDP is the structural similarity of feature maps at the
    precision of the step and at another one, GPDP that of the gradients of the cross-entropy in the images: the soft
    Dice overlap of their edges (Sobel, above the 85th percentile, k = 100) plus the cosine of their soft histograms of
    oriented gradients. A patch made at one precision is then to miss the other. The authors published no code, and
    these are decisions:

    - The other precision is drawn for each step from those that the schedule has at the time; `curriculum` starts with
      32 and 8 bit. The authors train all pairs, which costs a multiple.
    - Channels count by the mean of their magnitudes, slopes as a share of the longest in the image.
    - Adversarial images are those of the recipe's attack; without one they are the images as they are.
    - Layers with the same weight; `layer*` are the stages of a ResNet.

    The penalties say nothing about an attack at the precision that is attacked (white box).
    """

    feature: Annotated[float, Field(ge=0, description="factor of the similarity of features (FDP)")] = 0.8
    gradient: Annotated[float, Field(ge=0, description="factor of the similarity of input gradients (GPDP)")] = 0.5
    layers: Annotated[
        tuple[str, ...], Field(min_length=1, description="patterns of modules whose outputs are feature maps")
    ] = ("layer*",)

    def compute(self, step: TrainingStep) -> StepLoss:
        """Return the loss and both similarities as metrics; see `Objective.compute`.

        Raises:
            UsageError: no module has such a name, or its output is no map of at least 3x3.
        """
        other = _other_precision(step)
        if other is None:
            return step.default_loss()
        batch = step.adversarial
        images = batch.images.detach().clone().requires_grad_(self.gradient > 0)
        own = step.forward(images, features=(*self.layers, *step.default_features))
        partner = step.forward(images, precision=other, features=self.layers)
        ordinary = step.default_loss(own)
        compared = batch.attacked or len(images)
        features = _mean_similarity(own, partner, compared)
        loss, metrics = ordinary.loss + self.feature * features, {**ordinary.metrics, "feature_similarity": features}
        if self.gradient:
            gradients = [
                step.input_gradient(cross_entropy(output.logits.float(), step.labels, reduction="sum"), images)
                for output in (own, partner)
            ]
            similarity = structural_similarity(*(gradient[:compared] for gradient in gradients))
            loss, metrics["gradient_similarity"] = loss + self.gradient * similarity, similarity
        return StepLoss(loss, metrics)


def _other_precision(step: TrainingStep) -> Precision | None:
    """Return a precision that the schedule has at the time, the same in every process; None if there is no other."""
    others = [precision for precision in step.active if precision != step.precision]
    if not others:
        return None
    return others[int(torch.randint(len(others), (), generator=step.generator("partner", shared=True)))]


def _mean_similarity(own: ForwardOutput, partner: ForwardOutput, compared: int) -> Tensor:
    """Return the similarity of the first `compared` images, the mean over the partner's layers."""
    found = [
        structural_similarity(own.features[name][:compared], maps[:compared]) for name, maps in partner.features.items()
    ]
    return torch.stack(found).mean()
