"""An objective of one's own: match features of a low and a high precision, and penalize the gradient of the images."""

from typing import Annotated

from torch.nn.functional import cross_entropy, mse_loss

from qadtr_brevitas.core.plugin import Field, PrecisionField, plugin
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.training.objectives import Objective
from qadtr_brevitas.training.step import StepLoss, TrainingStep


@plugin
class FeatureMatching(Objective):
    """The ordinary loss, the distance of features at two precisions, and the input gradient at the low one."""

    low: Annotated[PrecisionField, Field(description="precision that learns the features")] = Precision(4, 4)
    high: Annotated[PrecisionField, Field(description="precision whose features are learned")] = Precision(32, 32)
    layers: Annotated[tuple[str, ...], Field(description="patterns of module names")] = ("layer*",)
    match: Annotated[float, Field(ge=0, description="factor of the feature distance")] = 1.0
    penalty: Annotated[float, Field(ge=0, description="factor of the input-gradient penalty")] = 1.0

    @property
    def precisions(self) -> tuple[Precision, ...]:
        return (self.low, self.high)

    def compute(self, step: TrainingStep) -> StepLoss:
        ordinary = step.default_loss()
        images = step.images.clone().requires_grad_()
        low = step.forward(images, precision=self.low, features=self.layers)
        # In training mode too, so that both are normalized by the statistics of the same batch.
        high = step.forward(step.images, precision=self.high, features=self.layers)
        distances = [mse_loss(low.features[name], high.features[name].detach()) for name in high.features]
        distance = sum(distances[1:], distances[0]) / len(distances)
        gradient = step.input_gradient(cross_entropy(low.logits, step.labels, reduction="sum"), images)
        squared = gradient.square().sum(dim=(1, 2, 3)).mean()
        loss = ordinary.loss + self.match * distance + self.penalty * squared
        return StepLoss(loss, {**ordinary.metrics, "feature_distance": distance, "input_gradient": squared})
