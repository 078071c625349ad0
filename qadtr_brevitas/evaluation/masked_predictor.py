"""What a model says of images under masks, and how many forward passes each image took."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qadtr_brevitas.evaluation.mask_fill import MaskFill


@dataclass(frozen=True)
class Certified:
    """What is known of a batch of images.

    Args:
        defended: (N,) int64, class that the defense predicts.
        proved: (N,) int64, class that the defense predicts whatever one patch of the size shows and wherever it lies;
            -1 where nothing is proved.
        passes: (N,) int64, forward passes that each image took; None where they were not counted.
        logits: (N, classes), mean over the masks of the first round, on the device of the images; gradients flow
            through it to the images. None where only outcomes are known.
    """

    defended: Tensor
    proved: Tensor
    passes: Tensor | None = None
    logits: Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence[Certified]) -> Certified:
        """Return several batches as one, all with passes and logits."""
        names = ("defended", "proved", "passes", "logits")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class MaskedPredictor:
    """Shows masked images to a model, several images at once.

    Args:
        model: images (n, C, H, W) in [0, 1] -> logits (n, classes), the same whenever it is asked; in eval mode.
        images: (N, C, H, W) in [0, 1].
        masks: boolean (M, H, W), on the device of the images.
        fill: what they show.
        batch_size: masked images in one forward pass.
        passes: (N,) int64, passes of each image so far; changed in place.
    """

    model: Callable[[Tensor], Tensor]
    images: Tensor
    masks: Tensor
    fill: MaskFill
    batch_size: int
    passes: Tensor = field(init=False)

    def __post_init__(self) -> None:
        zeros = torch.zeros(len(self.images), dtype=torch.int64, device=self.images.device)
        object.__setattr__(self, "passes", zeros)

    @property
    def count(self) -> int:
        """How many masks there are."""
        return len(self.masks)

    def under_each(self) -> Tensor:
        """(N, M, classes) logits under each mask alone, differentiable in the images."""
        images = torch.arange(len(self.images), device=self.images.device).repeat_interleave(self.count)
        first = torch.arange(self.count, device=self.images.device).repeat(len(self.images))
        return self.logits(images, first, first).unflatten(0, (len(self.images), self.count))

    @torch.no_grad()
    def under(self, images: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """(n,) classes of images, given by their index, under two masks, given by theirs."""
        classes = [logits.argmax(dim=1) for logits in self._portions(images, first, second)]
        return torch.cat([images.new_empty(0), *classes])

    def logits(self, images: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """(n, classes) logits of images, given by their index, under two masks, given by theirs; n is at least 1."""
        return torch.cat(list(self._portions(images, first, second)))

    def _portions(self, images: Tensor, first: Tensor, second: Tensor) -> Iterator[Tensor]:
        self.passes.index_add_(0, images, torch.ones_like(images))
        portions = (part.split(self.batch_size) for part in (images, first, second))
        for image, one, two in zip(*portions, strict=True) if len(images) else ():
            covered = (self.masks[one] | self.masks[two])[:, None]
            yield self.model(self.fill.cover(self.images[image], covered))


def plurality(classes: Tensor) -> Tensor:
    """(N,) most frequent class of each row of (N, M); of equally frequent ones the smallest."""
    votes = (classes[:, :, None] == classes[:, None, :]).sum(dim=2)
    most = votes.max(dim=1, keepdim=True).values
    return torch.where(votes == most, classes, classes.max() + 1).min(dim=1).values
