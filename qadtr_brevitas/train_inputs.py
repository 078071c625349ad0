"""The images a training step sees: which ones, augmented how, attacked how. All from (seed, step, rank)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from qadtr_brevitas.data.augment import crop_and_flip
from qadtr_brevitas.data.order import epoch_order
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.precision import Precision
from qadtr_brevitas.quant import frozen_weights
from qadtr_brevitas.recipe import Recipe
from qadtr_brevitas.seeding import generator


@dataclass(frozen=True)
class Inputs:
    """Where a process's share of each global batch comes from.

    Args:
        recipe: seed, batch size, augmentation and attack.
        split: training images.
        rank: number of this process.
        processes: how many there are.
        device: where batches go.
    """

    recipe: Recipe
    split: Split
    rank: int
    processes: int
    device: torch.device

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
        if self.recipe.data.augment != "none":
            rng = generator(self.recipe.seed, "augment", step, self.rank)
            images = crop_and_flip(images, flip=self.recipe.data.augment == "crop-flip", generator=rng)
        return images, labels

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
        count = 0 if attack is None else round(len(images) * attack.share)
        if attack is None or count == 0:
            return images, 0
        rng = generator(self.recipe.seed, "attack", step, str(precision), self.rank)
        model.eval()
        with frozen_weights(model):
            adversarial = attack.run(model, images[:count], labels[:count], generator=rng, precision=precision)
        model.train()
        return torch.cat([adversarial.detach(), images[count:]]), count


class PlainBatches(Sequence[Tensor]):
    """Batches of images (n, 3, H, W) in [0, 1] as they are, made when asked for.

    Args:
        split: where they come from.
        indices: which, in order; the last batch may be smaller.
        batch_size: images of a batch.
        device: where they go.
    """

    def __init__(self, split: Split, indices: Tensor, *, batch_size: int, device: torch.device) -> None:
        self._split = split
        self._chunks = indices.split(batch_size) if len(indices) else ()
        self._device = device

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, index: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._split.batch(self._chunks[index], device=self._device)[0]


def norm_batches(recipe: Recipe, split: Split, device: torch.device) -> PlainBatches:
    """Random training images, neither augmented nor attacked, to recalibrate norm statistics on."""
    size = recipe.train.batch_size
    # Whole batches only: each counts the same in the mean.
    count = min(recipe.train.norm_batches, len(split) // size) * size
    samples = epoch_order(len(split), seed=recipe.seed, epoch=-1)[:count]
    return PlainBatches(split, samples, batch_size=size, device=device)


@lru_cache(maxsize=1)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    return epoch_order(count, seed=seed, epoch=epoch)
