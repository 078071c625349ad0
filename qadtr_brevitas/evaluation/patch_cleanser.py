"""PatchCleanser's double masking: a prediction that can be trusted, and a proof for some of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from qadtr_brevitas.core.patch_size import PatchSizeLike
from qadtr_brevitas.evaluation.mask_fill import MaskFill
from qadtr_brevitas.evaluation.mask_groups import GroupedPredictor, MaskGroups
from qadtr_brevitas.evaluation.masked_predictor import Certified, MaskedPredictor, plurality
from qadtr_brevitas.evaluation.masks import check_covers

UNPROVED = -1
_FIRST_PAIRS = 8


class Predictor(Protocol):
    """What a model says of images under masks, or under groups of them, given by their numbers."""

    @property
    def count(self) -> int:
        """How many masks or groups there are."""
        ...

    @property
    def batch_size(self) -> int:
        """Masked images in one forward pass."""
        ...

    @property
    def passes(self) -> Tensor:
        """(N,) int64, passes of each image so far."""
        ...

    def under_each(self) -> Tensor:
        """(N, count, classes) logits under each alone."""
        ...

    def under(self, images: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """(n,) classes of images, given by their index, under two of them."""
        ...


def double_masking(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    masks: Tensor | MaskGroups,
    *,
    fill: MaskFill,
    patch: PatchSizeLike | None = None,
    batch_size: int = 256,
    prove: bool = True,
) -> Certified:
    """Defended predictions of images, and which of them are proved (PatchCleanser, Xiang et al. 2022).

    The image is seen under each mask. Where all masks agree, that is the prediction. Else the class of a mask that
    disagrees with most is taken if, under this mask, a second mask changes nothing (the first mask may have removed a
    patch), and the class of most masks if there is no such mask (Algorithm 1).

    A prediction is proved if the image has the same class under every pair of masks (two-mask correctness, Theorem 1):
    a patch lies under one of the masks wholly, and under it every second mask shows an image without the patch.

    The two-mask test as it is defined shows each image under all M * M ordered pairs. Here a pair is seen once whatever
    its order, an image on which single masks disagree is not tested, and each image meets the pairs first under whose
    masks the model is least sure, until one fails.

    Args:
        model: images (n, C, H, W) in [0, 1] -> logits (n, classes), the same whenever it is asked; in eval mode, with
            its weights frozen.
        images: (N, C, H, W) in [0, 1].
        masks: boolean (M, H, W) that cover any patch, see `masks.covering_masks`; or groups of them, each of which then
            stands for a mask, see `mask_groups.covering_groups`.
        fill: what masks show.
        patch: its size, for which the masks are checked; None to trust them.
        batch_size: masked images in one forward pass; the outcome does not depend on it.
        prove: whether to prove predictions; without, none is, and images on which all masks agree take M passes.

    Raises:
        UsageError: no mask covers the patch at some place.
    """
    fill = fill.to(images.device)
    if patch is not None:
        check_covers(masks.cores if isinstance(masks, MaskGroups) else masks, patch)
    if not isinstance(masks, MaskGroups):
        return _double_masking(MaskedPredictor(model, images, masks.to(images.device), fill, batch_size), prove=prove)
    groups = masks.to(images.device)
    # One by one: the logits under all pairs of masks are kept for an image, and its masks alone fill a batch.
    seen = (GroupedPredictor(model, image, groups, fill, batch_size) for image in images.split(1))
    return Certified.joined([_double_masking(predictor, prove=prove) for predictor in seen])


def _double_masking(predictor: Predictor, *, prove: bool) -> Certified:
    logits = predictor.under_each()
    alone = logits.argmax(dim=2)
    majority = plurality(alone)
    unanimous = (alone == majority[:, None]).all(dim=1)
    defended = torch.where(unanimous, majority, _second_round(predictor, alone, majority))
    proved = torch.full_like(majority, UNPROVED)
    if prove:
        holds = _holds_under_pairs(predictor, majority, _margins(logits), unanimous.nonzero()[:, 0])
        proved[holds] = majority[holds]
    return Certified(defended.cpu(), proved.cpu(), predictor.passes.cpu(), logits.mean(dim=1))


def _margins(logits: Tensor) -> Tensor:
    """(N, M) highest logit minus the second highest, of (N, M, classes)."""
    # A model of one class has no second.
    highest = logits.topk(min(2, logits.shape[2]), dim=2).values
    return highest[:, :, 0] - highest[:, :, -1]


def _second_round(predictor: Predictor, alone: Tensor, majority: Tensor) -> Tensor:
    """(N,) class of the first mask that disagrees with most and that no second mask contradicts, else the majority."""
    images, first = (alone != majority[:, None]).nonzero(as_tuple=True)
    count = predictor.count
    # Every other mask: a mask beside itself is the mask alone.
    second = torch.arange(count - 1, device=first.device).expand(len(first), -1)
    second = second + (second >= first[:, None])
    stands = _stand(predictor, images, first[:, None].expand_as(second), second, alone[images, first])
    # Masks in order: the first that stands wins, as a later one must not overwrite it.
    place = torch.full_like(majority, count).scatter_reduce(0, images[stands], first[stands], "amin")
    return torch.where(place < count, alone.gather(1, place.clamp(max=count - 1)[:, None])[:, 0], majority)


def _holds_under_pairs(predictor: Predictor, majority: Tensor, margins: Tensor, images: Tensor) -> Tensor:
    """Return those of the images (n,), on which all masks agree, that show the same class under every pair."""
    pairs = torch.combinations(torch.arange(predictor.count, device=images.device))
    # The least sure first: most images that fail do so within a few pairs.
    order = margins[images][:, pairs].sum(dim=2).argsort(dim=1, stable=True)
    first, second = pairs[order].unbind(dim=2)
    return images[_stand(predictor, images, first, second, majority[images])]


def _stand(predictor: Predictor, images: Tensor, first: Tensor, second: Tensor, classes: Tensor) -> Tensor:
    """Return the rows that show their class (n,) under all their pairs of masks, (n, pairs) each, in that order.

    A row that fails is not looked at again.
    """
    rows = torch.arange(len(images), device=images.device)
    done, pairs = 0, first.shape[1]
    while done < pairs and len(rows):
        # As many pairs as fill a batch, but of few rows not so many that a failure among the first costs all of them.
        stop = min(pairs, done + max(1, min(predictor.batch_size // len(rows), max(_FIRST_PAIRS, done))))
        now = stop - done
        found = predictor.under(
            images[rows].repeat_interleave(now), first[rows, done:stop].flatten(), second[rows, done:stop].flatten()
        )
        rows = rows[(found.view(-1, now) == classes[rows][:, None]).all(dim=1)]
        done = stop
    return rows
