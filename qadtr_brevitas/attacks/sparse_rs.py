"""Sparse-RS patches: random search that uses the network's outputs only, the check on gradient attacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar, Protocol

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import TargetedAttack
from qadtr_brevitas.attacks.losses import AttackLoss
from qadtr_brevitas.attacks.patch_settings import Index
from qadtr_brevitas.attacks.per_image import PatchTask, PerImagePatch
from qadtr_brevitas.attacks.relocation import AllowedCorners
from qadtr_brevitas.attacks.results import AttackGoal, AttackResult
from qadtr_brevitas.core.plugin import Field, plugin


@plugin
class SparseRs(PerImagePatch, TargetedAttack):
    """Image-specific Sparse-RS patch (Croce et al. 2022, "Sparse-RS", section on patches), black box.

    A patch of black, white and the six full colors, and its place, are searched at random: a change is kept if it
    lowers the loss. First squares of one color change, which shrink as queries are spent, then single pixels, then
    single channels; in between the patch moves, less and less far. An image that is broken costs no further queries.
    Only forward passes are made, so masked gradients do not hinder it.

    The defaults are those of the official code: untargeted margin loss, alpha 0.4, a move every 4th query; targeted
    cross-entropy, alpha 0.1, every 10th. It spends 10,000 queries on 20x20 pixels of 224x224 and 50,000 on a target;
    5,000 suit patches of 8x8 on CIFAR.
    """

    black_box: ClassVar[bool] = True

    target: Annotated[Index | None, Field(description="class to be predicted instead; null: any wrong one")] = None
    queries: Annotated[int, Field(ge=1, description="forward passes for an image, at most, in each restart")] = 5000
    loss: Annotated[
        AttackLoss | None,
        Field(description="what is descended; null: margin, or with a target cross-entropy"),
    ] = None
    alpha: Annotated[
        float | None,
        Field(gt=0, le=1, description="share of the patch that a change covers at first; null: 0.4, with a target 0.1"),
    ] = None
    move_every: Annotated[
        int | None, Field(ge=2, description="queries between moves of the patch; null: 4, with a target 10")
    ] = None
    restarts: Annotated[int, Field(ge=1, description="independent runs, of which the best is kept")] = 1

    def goal(self, labels: Tensor) -> AttackGoal:
        loss = self.loss or ("margin" if self.target is None else "cross-entropy")
        return AttackGoal.of(self.target, labels, loss=loss)

    def results(self, task: PatchTask, generator: torch.Generator) -> Iterator[AttackResult]:
        """Yield the result of one search for each restart, at places drawn anew; only outputs are used."""
        targeted, moves = self.target is not None, self.place == "random"
        search = RandomSearch(
            task=task,
            draw_corners=lambda: self.draw_corners(task, generator),
            allowed_corners=AllowedCorners.outside(self.keep_out, task.image_size, task.patch_size) if moves else None,
            queries=self.queries,
            alpha=self.alpha or (0.1 if targeted else 0.4),
            move_every=self.move_every or (10 if targeted else 4),
            draws=GeneratorDraws(generator, task.images.device),
        )
        return (search.run() for _ in range(self.restarts))


_START_SQUARES = 1000
_ENOUGH_SQUARES_A_PIXEL = 8
_SCHEDULE = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries, of 10,000, after each of which the share of the patch that a change covers is halved."""
_FIRST_REACH = 0.75
_MOST_IN_A_NUMBER = 32
"""Channels whose set one random integer draws; of more, the empty set is too rare to matter."""


class Draws(Protocol):
    """Random numbers for a batch of images, whose number leads each shape."""

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Draw uniform integers from `low` to below `high`."""
        ...

    def uniform(self, *shape: int) -> Tensor:
        """Draw uniform numbers in [0, 1)."""
        ...


@dataclass(frozen=True)
class GeneratorDraws:
    """Random numbers of one generator, for all images together.

    Args:
        generator: where they come from.
        device: where they are wanted.
    """

    generator: torch.Generator
    device: torch.device

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Draw uniform integers from `low` to below `high`."""
        drawn = torch.randint(low, high, shape, generator=self.generator, device=self.generator.device)
        return drawn.to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        """Draw uniform numbers in [0, 1)."""
        return torch.rand(*shape, generator=self.generator, device=self.generator.device).to(self.device)


@dataclass(frozen=True, kw_only=True)
class RandomSearch:
    """A search for the patch and the place of every image.

    Args:
        task: the images and the goal of the attack.
        draw_corners: random corners (N, 2) to start at.
        allowed_corners: where patches may move; None: they stay.
        queries: forward passes for an image, at most.
        alpha: share of the patch that a change covers at first.
        move_every: queries between tries to move.
        draws: draws starts, changes and moves, for every image alike whether it is done or not: what is drawn for one
            image does not depend on how the others do.
    """

    task: PatchTask
    draw_corners: Callable[[], Tensor]
    allowed_corners: AllowedCorners | None
    queries: int
    alpha: float
    move_every: int
    draws: Draws

    @torch.no_grad()
    def run(self) -> AttackResult:
        """Search until every image is a success or the queries are spent."""
        patches = self._start()
        corners = self.draw_corners().to(patches.device, copy=True)
        best = self.task.assess(patches, corners)
        for query in range(1, self.queries):
            left = (~best.success).nonzero().squeeze(1)
            if len(left) == 0:
                break
            new_patches, new_corners = self._change(patches, corners, query)
            changed = self.task.subset(left).assess(new_patches[left], new_corners[left])
            accepted = changed.beats(best.subset(left))
            index = left[accepted]
            patches[index], corners[index] = new_patches[index], new_corners[index]
            best = best.index_copy(index, changed.subset(accepted))
        return best

    def sides(self, query: int) -> tuple[int, int]:
        """Return height and width in pixels of the square that is changed in a query."""
        spent = int(query / self.queries * 10_000)
        share = self.alpha / 2 ** sum(spent > mark for mark in _SCHEDULE)
        height, width = self._size
        return max(1, int(math.sqrt(share) * height)), max(1, int(math.sqrt(share) * width))

    @cached_property
    def single_channels_from(self) -> int:
        """The query from which a change is one channel of one pixel: half of those left when squares are done."""
        first = next((query for query in range(self.queries) if self.sides(query) == (1, 1)), self.queries)
        return first + (self.queries - first) // 2

    @property
    def _size(self) -> tuple[int, int]:
        return self.task.mask.shape[0], self.task.mask.shape[1]

    def _start(self) -> Tensor:
        """Return patches (N, C, h, w) painted over with small squares of random colors."""
        count, (height, width) = len(self.task.images), self._size
        patches = self.task.images.new_zeros(count, self.task.channels, height, width)
        largest = max(1, math.ceil(math.sqrt(min(height, width))) - 1)
        # Where patches are small the rest would only cover each other.
        for _ in range(min(_START_SQUARES, _ENOUGH_SQUARES_A_PIXEL * height * width)):
            side = self.draws.integers(1, largest + 1, count)
            patches = torch.where(self._window(side, side), self._colors(), patches)
        return patches

    def _change(self, patches: Tensor, corners: Tensor, query: int) -> tuple[Tensor, Tensor]:
        """Return patches and corners to try next: in every image either the patch or its place is changed."""
        left = 1 - query / self.queries
        rows, columns = (int(_FIRST_REACH * left * side) for side in self.task.images.shape[-2:])
        if self.allowed_corners is not None and query % self.move_every == 0 and (rows or columns):
            offsets = [self.draws.integers(-reach, reach + 1, len(corners)) for reach in (rows, columns)]
            return patches, self.allowed_corners.shifted(corners, torch.stack(offsets, 1))
        height, width = (corners.new_full((len(corners),), side) for side in self.sides(query))
        window = self._window(height, width)
        if self.sides(query) != (1, 1):
            return torch.where(window, self._colors(), patches), corners
        return torch.where(window & self._flips(query), 1 - patches, patches), corners

    def _window(self, heights: Tensor, widths: Tensor) -> Tensor:
        """Draw one rectangle of the given size (N,) anywhere in each patch, boolean (N, 1, h, w)."""
        inside = [self._span(sides, length) for sides, length in zip((heights, widths), self._size, strict=True)]
        return inside[0][:, None, :, None] & inside[1][:, None, None, :]

    def _span(self, sides: Tensor, length: int) -> Tensor:
        """Draw a run of `sides` (N,) pixels anywhere in a row, boolean (N, length)."""
        first = self._uniform(length - sides + 1)[:, None]
        pixels = torch.arange(length, device=sides.device)
        return (pixels >= first) & (pixels < first + sides[:, None])

    def _uniform(self, highs: Tensor) -> Tensor:
        """Draw uniform integers (N,) from 0 to below each of `highs`."""
        drawn = self.draws.uniform(len(highs))
        # The product may round up to the bound itself.
        return torch.minimum((drawn * highs).long(), highs - 1)

    def _colors(self) -> Tensor:
        """Draw a color (N, C, 1, 1) for each image: each channel full or empty."""
        return self.draws.integers(0, 2, len(self.task.images), self.task.channels, 1, 1).to(self.task.images)

    def _flips(self, query: int) -> Tensor:
        """Draw the channels to invert, boolean (N, C, 1, 1): one, or any set that changes the color."""
        count = self.task.channels
        channels = torch.arange(count, device=self.task.images.device)
        if query >= self.single_channels_from:
            flips = self.draws.integers(0, count, len(self.task.images))[:, None] == channels
        elif count <= _MOST_IN_A_NUMBER:
            flips = (self.draws.integers(1, 2**count, len(self.task.images))[:, None] >> channels) & 1 == 1
        else:
            flips = self.draws.integers(0, 2, len(self.task.images), count) == 1
        return flips[:, :, None, None]
