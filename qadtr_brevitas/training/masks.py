"""Masked training: some images of a step are shown under one or two masks of the sets that certification uses.

A network certified by double masking has to be right under every pair of masks; here it learns that. Masks lie over the
images after the attack, as in the defended prediction. Everything drawn depends on (seed, step, precision, rank) only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qadtr_brevitas.config import MasksSection, Recipe
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.evaluation.mask_fill import MaskFill
from qadtr_brevitas.evaluation.masks import CoveringSet, covering_set, mean_color


@dataclass(frozen=True)
class MaskPlan:
    """How many masks each image of a batch gets.

    Args:
        counts: (N,) int64, 0, 1 or 2 masks.
        searched: (N,) bool, True where the worst ones are searched.
    """

    counts: Tensor
    searched: Tensor

    def share(self, rank: int, processes: int) -> MaskPlan:
        """Return the part of one process of several, every `processes`-th image."""
        return MaskPlan(self.counts[rank::processes], self.searched[rank::processes])


class TrainingMasks:
    """Chooses masks for the images of a step and lays them over them.

    Args:
        section: how many, for which patches, and how they are chosen.
        image_size: (H, W) of the training images in pixels.
        mean: mean color of the network's normalization.
        device: where the images are.

    Raises:
        UsageError: a patch does not fit on the images, or its masks hide whole images.
    """

    def __init__(
        self, section: MasksSection, image_size: tuple[int, int], *, mean: Sequence[float], device: torch.device
    ) -> None:
        self._section = section
        self._fill = MaskFill(mean_color(mean), section.fill).to(device)
        sets = [covering_set(image_size, patch, per_side=section.per_side) for patch in section.patches]
        for found in sets:
            _check_something_is_seen(found)
        self._masks = torch.cat([found.masks for found in sets]).to(device)
        sizes = [(len(found.rows), len(found.columns)) for found in sets]
        # (sets,) each: intervals of rows and of columns, and the number of the first mask.
        self._rows, self._columns = torch.tensor(sizes).unbind(dim=1)
        self._first = (self._rows * self._columns).cumsum(0) - self._rows * self._columns

    @classmethod
    def of(
        cls, recipe: Recipe, image_size: tuple[int, int], *, mean: Sequence[float], device: torch.device
    ) -> TrainingMasks | None:
        """Return the masks of a recipe, or None where it has none; arguments and errors are those of the class."""
        section = recipe.train.masks
        return None if section is None else cls(section, image_size, mean=mean, device=device)

    def plan(self, images: int, attacked: int, *, generator: torch.Generator) -> MaskPlan:
        """Draw which images of a global batch are masked.

        Args:
            images: in the batch.
            attacked: how many of the first are attacked.
            generator: of the step, the same in every process.
        """
        counts = torch.zeros(images, dtype=torch.int64)
        for start, stop, factor in ((0, attacked, self._section.attacked), (attacked, images, 1.0)):
            order = start + torch.randperm(stop - start, generator=generator)
            counts[order[: round((self._section.one + self._section.two) * factor * len(order))]] = 1
            counts[order[: round(self._section.two * factor * len(order))]] = 2
        searched = torch.zeros(images, dtype=torch.bool)
        if self._section.mode == "greedy":
            masked = counts.nonzero()[:, 0]
            order = torch.randperm(len(masked), generator=generator)
            searched[masked[order[: round(self._section.searched * len(masked))]]] = True
        return MaskPlan(counts, searched)

    def apply(
        self,
        model: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        plan: MaskPlan,
        *,
        generator: torch.Generator,
    ) -> Tensor:
        """Return the images (N, 3, H, W) under the masks of the plan.

        Args:
            model: in eval mode, at the precision of the step; asked only for images whose masks are searched.
            images: (N, 3, H, W) in [0, 1].
            labels: (N,).
            plan: for these images.
            generator: of the step and process, on the CPU.
        """
        chosen = self._draw(len(images), generator)
        searched = plan.searched.nonzero()[:, 0]
        if len(searched):
            chosen[searched] = self._worst(model, images, labels, searched, plan.counts, generator)
        chosen = chosen.to(images.device)
        counts = plan.counts.to(images.device)[:, None, None]
        first, second = self._masks[chosen[:, 0]], self._masks[chosen[:, 1]]
        covered = (first & (counts > 0)) | (second & (counts > 1))
        return self._fill.cover(images, covered[:, None])

    def _draw(self, images: int, generator: torch.Generator) -> Tensor:
        """(images, 2) numbers of two different masks of the same set."""
        sets = torch.randint(len(self._first), (images,), generator=generator)
        sizes = self._rows[sets] * self._columns[sets]
        first = _below(sizes, generator)
        # A set of one mask has no other.
        second = (first + 1 + _below((sizes - 1).clamp(min=1), generator)) % sizes
        return self._first[sets, None] + torch.stack([first, second], dim=1)

    def _worst(
        self,
        model: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        searched: Tensor,
        counts: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """(n, 2) masks of highest loss for the images with the numbers `searched`: the worst, and the worst beside it.

        The second is right only for images with two masks.
        """
        sets = torch.randint(len(self._first), (len(searched),), generator=generator)
        candidates = self._candidates(sets, generator)
        first = self._search(model, images, labels, searched, candidates, None)
        candidates = self._candidates(sets, generator)
        second = candidates[:, 0].clone()
        pairs = (counts[searched] > 1).nonzero()[:, 0]
        if len(pairs):
            second[pairs] = self._search(model, images, labels, searched[pairs], candidates[pairs], first[pairs])
        return torch.stack([first, second], dim=1)

    def _candidates(self, sets: Tensor, generator: torch.Generator) -> Tensor:
        """(n, grid * grid) masks of the sets (n,): one drawn from each block of neighbors."""
        grid = self._section.grid
        rows, columns = (
            ((torch.arange(grid) + torch.rand(len(sets), grid, generator=generator)) * count[sets, None] / grid).long()
            for count in (self._rows, self._columns)
        )
        numbers = rows[:, :, None] * self._columns[sets, None, None] + columns[:, None, :]
        return self._first[sets, None] + numbers.flatten(1)

    @torch.no_grad()
    def _search(
        self,
        model: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        numbers: Tensor,
        candidates: Tensor,
        beside: Tensor | None,
    ) -> Tensor:
        """(n,) the candidate (n, k) of highest loss for each image, beside the masks (n,) that lie there already."""
        there = numbers.to(images.device)
        seen, truth = images[there], labels[there]
        covered = None if beside is None else self._masks[beside.to(images.device)]
        losses: list[Tensor] = []
        for candidate in candidates.to(images.device).unbind(dim=1):
            masks = self._masks[candidate] if covered is None else self._masks[candidate] | covered
            logits = model(self._fill.cover(seen, masks[:, None]))
            losses.append(cross_entropy(logits.float(), truth, reduction="none"))
        worst = torch.stack(losses, dim=1).argmax(dim=1).cpu()
        return candidates.gather(1, worst[:, None])[:, 0]


def _below(bounds: Tensor, generator: torch.Generator) -> Tensor:
    """Whole numbers from 0 to below each of the bounds."""
    drawn = (torch.rand(len(bounds), generator=generator, dtype=torch.float64) * bounds).long()
    return drawn.minimum(bounds - 1)


def _check_something_is_seen(found: CoveringSet) -> None:
    height, width = found.rows.shape[1], found.columns.shape[1]
    if found.masks.flatten(1).all(dim=1).any():
        raise UsageError(
            f"train.masks: masks against patches of {found.patch} pixels hide images of {height}x{width} whole: give "
            "smaller train.masks.patches or a larger train.masks.per_side"
        )
