"""The images a training step sees: which ones, augmented how, attacked how. All from (seed, step, rank)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor, nn

from qadtr_brevitas.attacks.base import Memory
from qadtr_brevitas.config import Recipe
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.core.seeding import generator
from qadtr_brevitas.data.augment import crop_and_flip
from qadtr_brevitas.data.split import Split, epoch_order
from qadtr_brevitas.quant import frozen_weights


@dataclass(frozen=True)
class Inputs:
    """Where a process's share of each global batch comes from.

    Args:
        recipe: seed, batch size, augmentation and attack.
        split: training images.
        rank: number of this process.
        processes: how many there are.
        device: where batches go.
        memory: what the attack keeps from step to step.
    """

    recipe: Recipe
    split: Split
    rank: int
    processes: int
    device: torch.device
    memory: Memory = field(default_factory=dict)

    def batch(self, step: int, *, steps_per_epoch: int) -> tuple[Tensor, Tensor]:
        """This process's images (n, 3, H, W) in [0, 1], augmented, and labels (n,).

        Every `processes`-th image of the global batch: all processes together see what a single one would, and the
        attacked first share of each is the first share of the global batch.
        """
        epoch, position = divmod(step, steps_per_epoch)
        first = position * self.recipe.train.batch_size
        order = _order(len(self.split), self.recipe.seed, epoch)
        chosen = order[first : first + self.recipe.train.batch_size][self.rank :: self.processes]
        images, labels = self.split.batch(chosen, device=self.device)
        return _augment(images, self.recipe, step, self.rank), labels

    def attack(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, step: int, precision: Precision
    ) -> tuple[Tensor, int]:
        """Replaces the first `share` of the images by adversarial ones, made on the model at the step's precision.

        Args:
            model: at `precision`; it is put into training mode.
            images: (n, 3, H, W) in [0, 1].
            labels: (n,).
            step: 0-based.
            precision: what the model is at.

        Returns:
            All images, and how many of the first are attacked.
        """
        attack = self.recipe.train.attack
        # Rounded once for all processes, or shares of small batches would differ with their number.
        everywhere = 0 if attack is None else round(self.recipe.train.batch_size * attack.share)
        count = min(len(images), len(range(self.rank, everywhere, self.processes)))
        if attack is None or count == 0:
            return images, 0
        rng = generator(self.recipe.seed, "attack", step, str(precision), self.rank)
        model.eval()
        with frozen_weights(model):
            kept = {"memory": self.memory} if getattr(attack, "remembers", False) else {}
            adversarial = attack.run(model, images[:count], labels[:count], generator=rng, precision=precision, **kept)
        model.train()
        return torch.cat([adversarial.detach(), images[count:]]), count


class NormBatches(Sequence[Tensor]):
    """Random training images (n, 3, H, W) in [0, 1] to recalibrate norm statistics on, made when asked for.

    Not attacked, but augmented as in training: on images as they are, the statistics miss what a net trained on
    shifted ones with black borders expects (digits: 71 % instead of 87 %).

    Args:
        recipe: number and size of batches, seed and augmentation.
        split: training images; no more whole batches are made than they fill.
        device: where batches go.
    """

    def __init__(self, recipe: Recipe, split: Split, device: torch.device) -> None:
        self._recipe, self._split, self._device = recipe, split, device
        size = recipe.train.batch_size
        # Whole batches only: each counts the same in the mean.
        self._count = min(recipe.train.norm_batches, len(split) // size)
        self._order = epoch_order(len(split), seed=recipe.seed, epoch=-1)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= index < self._count:
            raise IndexError(index)
        size = self._recipe.train.batch_size
        images, _ = self._split.batch(self._order[index * size : (index + 1) * size], device=self._device)
        return _augment(images, self._recipe, "norms", index)


def _augment(images: Tensor, recipe: Recipe, *keys: int | str) -> Tensor:
    if recipe.data.augment == "none":
        return images
    rng = generator(recipe.seed, "augment", *keys)
    return crop_and_flip(images, flip=recipe.data.augment == "crop-flip", generator=rng)


@lru_cache(maxsize=1)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    return epoch_order(count, seed=seed, epoch=epoch)
