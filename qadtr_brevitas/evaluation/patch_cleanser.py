"""PatchCleanser's double masking: a prediction that can be trusted, and a proof for some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

UNPROVED = -1


@dataclass(frozen=True)
class Certified:
    """What is known of a batch of images.

    Args:
        defended: (N,) int64, class that the defense predicts.
        proved: (N,) int64, class that the defense predicts whatever one patch of the size shows and wherever it lies;
            -1 where nothing is proved.
    """

    defended: Tensor
    proved: Tensor


def double_masking(
    model: Callable[[Tensor], Tensor], images: Tensor, masks: Tensor, *, fill: Tensor, batch_size: int = 256
) -> Certified:
    """Defended predictions of images, and which of them are proved (PatchCleanser, Xiang et al. 2022).

    The image is seen under each mask. Where all masks agree, that is the prediction. Else the class of a mask that
    disagrees with most is taken if, under this mask, a second mask changes nothing (the first mask may have removed a
    patch), and the class of most masks if there is no such mask (Algorithm 1).

    A prediction is proved if the image has the same class under every pair of masks (two-mask correctness, Theorem 1):
    a patch lies under one of the masks wholly, and under it every second mask shows an image without the patch.

    Args:
        model: images (n, 3, H, W) in [0, 1] -> logits (n, classes), the same whenever it is asked; in eval mode.
        images: (N, 3, H, W) in [0, 1].
        masks: boolean (M, H, W) that cover any patch, see `masks.covering_masks`.
        fill: (3, 1, 1), color of what is covered, in [0, 1].
        batch_size: masked images in one forward pass.
    """
    predictor = _MaskedPredictor(model, images, masks.to(images.device), fill.to(images.device), batch_size)
    alone = predictor.under_each()
    majority = _majority(alone)
    unanimous = (alone == majority[:, None]).all(dim=1)
    defended = torch.where(unanimous, majority, _second_round(predictor, alone, majority))
    proved = torch.where(_holds_under_pairs(predictor, majority, unanimous), majority, UNPROVED)
    return Certified(defended.cpu(), proved.cpu())


@dataclass(frozen=True)
class _MaskedPredictor:
    """Shows masked images to the model."""

    model: Callable[[Tensor], Tensor]
    images: Tensor
    masks: Tensor
    fill: Tensor
    batch_size: int

    def under_each(self) -> Tensor:
        """(N, M) classes under each mask alone."""
        count, masks = len(self.images), len(self.masks)
        images = torch.arange(count, device=self.images.device).repeat_interleave(masks)
        first = torch.arange(masks, device=self.images.device).repeat(count)
        return self.under(images, first, first).view(count, masks)

    def under(self, images: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """(n,) classes of images, given by their index, under two masks, given by theirs."""
        parts = [
            self.model(torch.where((self.masks[one] | self.masks[two])[:, None], self.fill, self.images[image]))
            for image, one, two in self._portions(images, first, second)
        ]
        return torch.cat([logits.argmax(dim=1) for logits in parts]) if parts else images.new_empty(0)

    def _portions(self, *indices: Tensor) -> Iterator[tuple[Tensor, ...]]:
        return zip(*(part.split(self.batch_size) for part in indices), strict=True) if len(indices[0]) else iter(())


def _majority(classes: Tensor) -> Tensor:
    """(N,) most frequent class of each row of (N, M); of equally frequent ones the smallest."""
    votes = (classes[:, :, None] == classes[:, None, :]).sum(dim=2)
    most = votes.max(dim=1, keepdim=True).values
    return torch.where(votes == most, classes, classes.max() + 1).min(dim=1).values


def _second_round(predictor: _MaskedPredictor, alone: Tensor, majority: Tensor) -> Tensor:
    """(N,) class of the first mask that disagrees with most and that no second mask contradicts, else the majority."""
    images, first = (alone != majority[:, None]).nonzero(as_tuple=True)
    masks = len(predictor.masks)
    second = torch.arange(masks, device=first.device).repeat(len(first))
    found = predictor.under(images.repeat_interleave(masks), first.repeat_interleave(masks), second).view(-1, masks)
    stands = (found == alone[images, first][:, None]).all(dim=1)
    # Masks in order: the first that stands wins, as a later one must not overwrite it.
    place = torch.full_like(majority, masks).scatter_reduce(0, images[stands], first[stands], "amin")
    return torch.where(place < masks, alone.gather(1, place.clamp(max=masks - 1)[:, None])[:, 0], majority)


def _holds_under_pairs(predictor: _MaskedPredictor, majority: Tensor, unanimous: Tensor) -> Tensor:
    """(N,) True where every pair of different masks shows the same class as each mask alone."""
    pairs = torch.combinations(torch.arange(len(predictor.masks), device=majority.device))
    open_images = unanimous.nonzero()[:, 0]
    while len(pairs) and len(open_images):
        # As many pairs as fill a batch; images that fail are not looked at again, which saves most of the work.
        count = max(1, predictor.batch_size // len(open_images))
        now, pairs = pairs[:count], pairs[count:]
        images = open_images.repeat_interleave(len(now))
        first, second = now.repeat(len(open_images), 1).unbind(dim=1)
        same = predictor.under(images, first, second) == majority[images]
        open_images = open_images[same.view(-1, len(now)).all(dim=1)]
    holds = torch.zeros_like(unanimous)
    holds[open_images] = True
    return holds
