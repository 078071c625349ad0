"""Overlapping masks: several over each place of a patch instead of one, whose logits are averaged.

A certificate by double masking fails if a single pair of masks shows another class, often by little. With an overlap of
k, masks of the same size lie k times as densely along each side. What stands in for one mask is a group: the k x k
masks that all cover the same places of a patch. The class under a group is that of the mean of the logits under its
masks, and the class under two groups that of the mean over the pairs of a mask of each.

If one mask of a group covers a patch at its places, all of them do, and none of these logits depends on the patch: that
is all that PatchCleanser's theorems ask of what is seen under a mask (tests/evaluation/test_mask_groups.py tries every
patch). Groups share masks, so that a pair of masks is seen once for all pairs of groups that it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qadtr_brevitas.core.patch_size import PatchSize, PatchSizeLike
from qadtr_brevitas.evaluation.mask_fill import MaskFill
from qadtr_brevitas.evaluation.masked_predictor import MaskedPredictor
from qadtr_brevitas.evaluation.masks import MASKS_PER_SIDE, check_fits


@dataclass(frozen=True, eq=False)
class MaskGroups:
    """Masks, and which of them cover the same places.

    Args:
        masks: boolean (M, H, W), True where an image is covered.
        members: int64 (G, K), the numbers of the masks of each group.
    """

    masks: Tensor
    members: Tensor

    @property
    def cores(self) -> Tensor:
        """Boolean (G, H, W), what all masks of a group cover."""
        return self.masks[self.members].all(dim=1)

    @cached_property
    def pairs(self) -> Tensor:
        """Boolean (M, M), which pairs of masks belong to some pair of different groups; symmetric."""
        belongs = torch.zeros(len(self.members), len(self.masks)).scatter_(1, self.members.cpu(), 1.0)
        together = belongs.sum(dim=0)
        return torch.outer(together, together) > belongs.T @ belongs

    def to(self, device: torch.device) -> MaskGroups:
        """Return the groups on a device."""
        return MaskGroups(self.masks.to(device), self.members.to(device))


def covering_groups(
    image_size: tuple[int, int], patch: PatchSizeLike, *, per_side: int = MASKS_PER_SIDE, overlap: int = 2
) -> MaskGroups:
    """Return masks as large as those of `covering_set` in groups of which one covers all of a patch, wherever it lies.

    A mask longer than its side of the patch by s - 1 pixels covers s places along it; `overlap` of them, or s if that
    is less, cover each place. At the borders of an image masks are smaller.

    Args:
        image_size: (H, W) in pixels.
        patch: the size, as 5 or (3, 10).
        per_side: masks along each side without overlap; more are smaller.
        overlap: masks along each side over a place.

    Raises:
        UsageError: the patch is larger than the image.
    """
    size = PatchSize.parse(patch)
    check_fits(image_size, size)
    rows, row_groups = _along(image_size[0], size.height, per_side, overlap)
    columns, column_groups = _along(image_size[1], size.width, per_side, overlap)
    masks = (rows[:, None, :, None] & columns[None, :, None, :]).flatten(0, 1)
    members = row_groups[:, None, :, None] * len(columns) + column_groups[None, :, None, :]
    return MaskGroups(masks, members.flatten(0, 1).flatten(1))


def _along(side: int, patch: int, count: int, overlap: int) -> tuple[Tensor, Tensor]:
    """Return which pixels of a side each mask covers, boolean (k, side), and the masks of each group, int64 (g, o)."""
    places = side - patch + 1
    stride = -(-places // count)
    offsets = sorted({-(-number * stride // overlap) % stride for number in range(overlap)})
    # From the first mask that covers place 0 to the last one that covers the last place, partly outside of the image.
    starts = [start + offset for start in range(-stride, places, stride) for offset in offsets]
    starts = [start for start in starts if -stride < start < places]
    groups = {
        tuple(number for number, start in enumerate(starts) if start <= place < start + stride): None
        for place in range(places)
    }
    begin, pixels = torch.tensor(starts)[:, None], torch.arange(side)
    covered = (pixels >= begin) & (pixels < begin + patch + stride - 1)
    return covered, torch.tensor(list(groups))


class GroupedPredictor:
    """Shows one image under groups of masks to a model; each pair of masks is seen once.

    Args:
        model: images (n, C, H, W) in [0, 1] -> logits (n, classes), the same whenever it is asked; in eval mode.
        image: (1, C, H, W) in [0, 1].
        groups: the masks, on the device of the image.
        fill: what they show.
        batch_size: masked images in one forward pass.
    """

    def __init__(
        self, model: Callable[[Tensor], Tensor], image: Tensor, groups: MaskGroups, fill: MaskFill, batch_size: int
    ) -> None:
        self.members, self.count, self.batch_size = groups.members, len(groups.members), batch_size
        self._seen = MaskedPredictor(model, image, groups.masks, fill, batch_size)
        masks = len(groups.masks)
        # (M, M, classes) logits under pairs of masks, and which of them are known.
        self._logits = image.new_empty(0)
        self._known = torch.eye(masks, dtype=torch.bool, device=image.device)

    @property
    def passes(self) -> Tensor:
        """(1,) int64, passes so far."""
        return self._seen.passes

    def under_each(self) -> Tensor:
        """(1, G, classes) logits under each group alone, differentiable in the image."""
        (logits,) = self._seen.under_each()
        self._logits = torch.diag_embed(logits.detach().T, dim1=0, dim2=1)
        return logits[self.members].mean(dim=1)[None]

    @torch.no_grad()
    def under(self, images: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """(n,) classes under two groups, given by their numbers (n,); `under_each` comes before. All images are one."""
        one, other = self.members[first], self.members[second]
        self._look_at(one, other)
        parts = zip(one.split(self.batch_size), other.split(self.batch_size), strict=True)
        classes = [self._logits[a[:, :, None], b[:, None, :]].mean(dim=(1, 2)).argmax(dim=1) for a, b in parts]
        return torch.cat([images.new_empty(0), *classes])

    def _look_at(self, one: Tensor, other: Tensor) -> None:
        """Run the model under those pairs of a mask of one row and a mask of the other that are not known yet."""
        asked = torch.zeros_like(self._known)
        asked[one[:, :, None], other[:, None, :]] = True
        first, second = ((asked | asked.T) & ~self._known).triu().nonzero(as_tuple=True)
        if not len(first):
            return
        found = self._seen.logits(torch.zeros_like(first), first, second)
        self._logits[first, second] = self._logits[second, first] = found
        self._known[first, second] = self._known[second, first] = True
