"""Attacks on every pixel within a small distance: FGSM and PGD of the library torchattack, and MI-FGSM."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import nullcontext
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import IterativeAttack, Model, PixelAttack, TargetedAttack, TrainingAttack
from qadtr_brevitas.attacks.descent import input_gradients
from qadtr_brevitas.attacks.library import InputGradientModel, seeded
from qadtr_brevitas.attacks.results import AttackGoal, AttackResult, best_per_image
from qadtr_brevitas.core.extras import require
from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.core.precision import Precision

Distance = Annotated[
    float, Field(ge=0, le=1, description="largest change of a value, in [0, 1] units: 8/255 is 0.0314")
]
StepSize = Annotated[
    float | None, Field(gt=0, le=1, description="step in pixel values; null: a quarter of eps, as 2/255 to 8/255")
]
Target = Annotated[int | None, Field(ge=0, description="class to be predicted instead; null: any wrong one")]


@plugin
class TorchAttack(PixelAttack, TargetedAttack):
    """A pixel attack of the library torchattack. A subclass names the library's class and its arguments."""

    library_class: ClassVar[str]
    """Name of the class in torchattack."""

    eps: Distance = 0.03
    target: Target = None

    @abstractmethod
    def library_arguments(self) -> dict[str, float]:
        """Return the arguments of the library's class beside `eps`."""

    @property
    def runs(self) -> int:
        """Independent runs, of which the best is kept for every image."""
        return 1

    @property
    def is_random(self) -> bool:
        """Whether the library draws random numbers with these settings."""
        return False

    def run(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator,
        precision: Precision | None = None,
    ) -> Tensor:
        """Return images at most `eps` away. The model's parameters receive no gradients.

        Args:
            model: in evaluation mode, at the precision to attack.
            images: (N, C, H, W) in [0, 1].
            labels: (N,), the true classes.
            generator: draws random starts.
            precision: not used.

        Returns:
            (N, C, H, W) in [0, 1].

        Raises:
            UsageError: the model has no class `target`.
        """
        arguments = {"eps": self.eps, **self.library_arguments()}

        def run_once() -> Tensor:
            with seeded(generator, images.device) if self.is_random else nullcontext():
                return _run_library(self.library_class, model, images, labels, self.target, **arguments)

        if self.runs == 1:
            return run_once()

        goal = AttackGoal.of(self.target, labels, loss="cross-entropy")

        def result() -> AttackResult:
            adversarial = run_once()
            return goal.assess(adversarial, model(adversarial))

        with torch.no_grad():
            return best_per_image(result() for _ in range(self.runs)).images


@plugin
class Fgsm(TorchAttack):
    """FGSM (Goodfellow et al. 2015): x + eps sign(gradient of the cross-entropy) in one step, clipped to [0, 1]."""

    library_class: ClassVar[str] = "FGSM"

    def library_arguments(self) -> dict[str, float]:
        return {}


@plugin
class Pgd(TorchAttack, TrainingAttack, IterativeAttack):
    """PGD (Madry et al. 2018): sign steps from a random start, projected to the eps ball and to [0, 1].

    The default of 20 steps is for evaluation; `steps=7` is usual in adversarial training, on `share` of each batch.
    """

    library_class: ClassVar[str] = "PGD"

    share: Annotated[float, Field(gt=0, le=1, description="share of each training batch that is attacked")] = 1.0
    alpha: StepSize = None
    steps: Annotated[int, Field(ge=0, description="sign steps; 0: the start")] = 20
    random_start: Annotated[bool, Field(description="start anywhere in the ball instead of at the image")] = True
    restarts: Annotated[int, Field(ge=1, description="independent runs, of which the best is kept")] = 1

    @property
    def runs(self) -> int:
        return self.restarts

    @property
    def is_random(self) -> bool:
        return self.random_start

    def library_arguments(self) -> dict[str, float]:
        return {"alpha": self.alpha or self.eps / 4, "steps": self.steps, "random_start": self.random_start}


@plugin
class MiFgsm(PixelAttack, TargetedAttack, IterativeAttack):
    """MI-FGSM (Dong et al. 2018): sign steps along an average of gradients, each divided by its mean size.

    An image without a gradient in a step goes on along the average of the steps before.
    """

    eps: Distance = 0.03
    target: Target = None
    alpha: StepSize = None
    steps: Annotated[int, Field(ge=1, description="sign steps")] = 10
    decay: Annotated[float, Field(ge=0, description="share of the average that is carried over a step")] = 1.0

    def run(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator,
        precision: Precision | None = None,
    ) -> Tensor:
        goal = AttackGoal.of(self.target, labels, loss="cross-entropy")
        network = InputGradientModel(model)
        adversarial, average = images.detach(), torch.zeros_like(images)
        for _ in range(self.steps):
            values = adversarial.detach().requires_grad_()
            with torch.enable_grad():
                (gradient,) = input_gradients(goal.assess(values, network(values)).losses, [values])
            size = gradient.abs().mean((1, 2, 3), keepdim=True).clamp(min=torch.finfo(gradient.dtype).tiny)
            average = self.decay * average + gradient / size
            stepped = adversarial - (self.alpha or self.eps / 4) * average.sign()
            adversarial = torch.clamp(stepped, images - self.eps, images + self.eps).clamp(0, 1)
        return adversarial.detach()


def _run_library(
    name: str,
    model: Model,
    images: Tensor,
    labels: Tensor,
    target: int | None,
    **arguments: float,
) -> Tensor:
    """Run a class of torchattack without gradients on parameters."""
    library = require("torchattack", extra="attacks", purpose=f"attack {name}")
    attack = getattr(library, name)(
        InputGradientModel(model, target=target), device=images.device, targeted=target is not None, **arguments
    )
    with torch.enable_grad():
        adversarial = attack(images, labels if target is None else torch.full_like(labels, target)).detach()
    return adversarial
