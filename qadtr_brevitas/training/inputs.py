"""The images of a training step as an objective sees them: attacked and masked, from (seed, step, rank)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import Memory, RememberingAttack, TrainingAttack
from qadtr_brevitas.config import Recipe
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.core.seeding import generator
from qadtr_brevitas.quant import SwitchableModel, frozen_weights
from qadtr_brevitas.quant.folding import Foldable, find_foldable, folded
from qadtr_brevitas.training.masks import TrainingMasks
from qadtr_brevitas.training.objectives import ordinary_loss
from qadtr_brevitas.training.step import AdversarialBatch, EarlierPass, ForwardOutput, StepLoss, TrainingStep

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class TrainingInputs:
    """Attacks and masks one process's share of each global batch.

    Args:
        recipe: seed, batch size, attack and masks.
        rank: number of this process.
        processes: how many there are.
        masks: lays the recipe's masks over images; None where it has none.
        memory: what the attack keeps from step to step.
        foldable: what is folded while images are made, once it is found.
    """

    recipe: Recipe
    rank: int
    processes: int
    masks: TrainingMasks | None = None
    memory: Memory = field(default_factory=dict)
    foldable: list[Foldable] = field(default_factory=list[Foldable])

    def attack(
        self, model: SwitchableModel, images: Tensor, labels: Tensor, *, step: int, precision: Precision
    ) -> AdversarialBatch:
        """Replace the first `share` of the images by adversarial ones, made on the model at the step's precision.

        Args:
            model: at `precision`; afterwards it is in training mode.
            images: (n, 3, H, W) in [0, 1].
            labels: (n,).
            step: 0-based.
            precision: the precision that the model runs at.

        Returns:
            All images, and how many of the first are attacked.
        """
        attack = self.recipe.train.attack
        count = 0 if attack is None else min(len(images), self._attacked_images(attack))
        if attack is None or count == 0:
            return AdversarialBatch(images, 0)
        rng = generator(self.recipe.seed, "attack", step, str(precision), self.rank)
        with self._crafting(model, images):
            adversarial = self._run(attack, model, images[:count], labels[:count], rng, precision)
        return AdversarialBatch(torch.cat([adversarial.detach(), images[count:]]), count)

    def mask(
        self, model: SwitchableModel, batch: AdversarialBatch, labels: Tensor, *, step: int, precision: Precision
    ) -> AdversarialBatch:
        """Lay masks over shares of the images, chosen on the model at the step's precision.

        Args:
            model: at `precision`; afterwards it is in training mode.
            batch: attacked and other images, n of them.
            labels: (n,).
            step: 0-based.
            precision: the precision that the model runs at.
        """
        if self.masks is None:
            return batch
        train, seed = self.recipe.train, self.recipe.seed
        # Drawn for the whole batch, so that shares do not differ with the number of processes.
        shared = generator(seed, "masks", step, str(precision))
        attacked = 0 if train.attack is None else self._attacked_everywhere(train.attack)
        plan = self.masks.plan(train.batch_size, attacked, generator=shared).share(self.rank, self.processes)
        own = generator(seed, "masks", step, str(precision), self.rank)
        with self._crafting(model, batch.images):
            images = self.masks.apply(model, batch.images, labels, plan, generator=own)
        return AdversarialBatch(images, batch.attacked, (plan.counts > 0).to(images.device))

    @contextmanager
    def _crafting(self, model: SwitchableModel, images: Tensor) -> Generator[None]:
        """Evaluate with frozen weights and folded norms in a block; afterwards the model is in training mode."""
        model.eval()
        if not self.foldable:
            self.foldable.append(find_foldable(model, images[:2]))
        with frozen_weights(model), folded(model, self.foldable[0]):
            yield
        model.train()

    def _attacked_images(self, attack: TrainingAttack) -> int:
        """Return how many images of this process's share of a global batch are attacked."""
        return len(range(self.rank, self._attacked_everywhere(attack), self.processes))

    def _attacked_everywhere(self, attack: TrainingAttack) -> int:
        # Rounded once for all processes, or shares of small batches would differ with their number.
        return round(self.recipe.train.batch_size * attack.share)

    def _run(
        self,
        attack: TrainingAttack,
        model: SwitchableModel,
        images: Tensor,
        labels: Tensor,
        rng: torch.Generator,
        precision: Precision,
    ) -> Tensor:
        if isinstance(attack, RememberingAttack) and attack.remembers:
            return attack.run(model, images, labels, generator=rng, precision=precision, memory=self.memory)
        return attack.run(model, images, labels, generator=rng, precision=precision)


def make_step(
    inputs: TrainingInputs,
    accelerator: Accelerator,
    model: SwitchableModel,
    images: Tensor,
    labels: Tensor,
    number: int,
    precision: Precision,
    *,
    attacked: bool,
    compiled: Callable[[Tensor], Tensor] | None = None,
    active: Sequence[Precision] = (),
    earlier: EarlierPass | None = None,
    targets: Tensor | None = None,
) -> TrainingStep:
    """Return what an objective sees of one batch at one precision.

    Args:
        inputs: attack and mask the images, as the recipe says.
        accelerator: of this process.
        model: in training mode and at `precision`.
        images: (n, 3, H, W) in [0, 1], augmented.
        labels: (n,).
        number: optimizer steps done.
        precision: the precision of the loss.
        attacked: whether images are attacked and masked.
        compiled: a faster form of the model for training passes.
        active: the precisions that the schedule draws from at this time.
        earlier: what the same optimizer step computed at the precision before.
        targets: (n, classes), shares of the classes in mixed images; None where images are not mixed.
    """
    train = inputs.recipe.train

    def attack() -> AdversarialBatch:
        if not attacked:
            return AdversarialBatch(images, 0)
        with attack_autocast(accelerator):
            batch = inputs.attack(model, images, labels, step=number, precision=precision)
            return inputs.mask(model, batch, labels, step=number, precision=precision)

    def default_loss(step: TrainingStep, output: ForwardOutput) -> StepLoss:
        return ordinary_loss(step, output, label_smoothing=train.label_smoothing, regularizers=train.regularizers)

    return TrainingStep(
        model,
        images,
        labels,
        precision=precision,
        number=number,
        seed=inputs.recipe.seed,
        rank=inputs.rank,
        attack=attack,
        default_loss=default_loss,
        default_features=[pattern for regularizer in train.regularizers for pattern in regularizer.features],
        compiled=compiled,
        active=active,
        earlier=earlier,
        targets=targets,
    )


def attack_autocast(accelerator: Accelerator) -> AbstractContextManager[object]:
    """Return a context of bfloat16 autocast, or of no autocast in float16, which rounds unscaled gradients to zero."""
    if accelerator.mixed_precision == "fp16":
        return torch.autocast(accelerator.device.type, enabled=False)
    return accelerator.autocast()
