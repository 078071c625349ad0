"""Sparse-RS patches: random search with nothing but the network's outputs, the check on gradient attacks.

The random search of Sparse-RS: squares of one color and places, kept if the loss falls. No gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from qadtr_brevitas.attacks.patch_fields import Index
from qadtr_brevitas.attacks.per_image import Attempt, ImageAttackInputs, ImagePatch, PatchProblem
from qadtr_brevitas.attacks.relocation import AllowedCorners
from qadtr_brevitas.core.plugin import Field, plugin


@plugin
class SparseRs(ImagePatch):
    """Image-specific Sparse-RS patch (Croce et al. 2022, "Sparse-RS", section on patches), black box.

    A patch of black, white and the six full colors, and its place, are searched at random: a change is kept if it
    lowers the loss. First squares of one color, which shrink as queries are spent, then single pixels, then single
    channels; in between the patch is moved, less and less far. An image that is done is asked no more. Only forward
    passes are made, so masked gradients do not hinder it.

    Values of the official code by default: untargeted margin loss, alpha 0.4, a move every 4th query; targeted
    cross-entropy, alpha 0.1, every 10th. It spends 10,000 queries on 20x20 pixels of 224x224 and 50,000 on a target;
    5,000 suit patches of 8x8 on CIFAR.
    """

    black_box: ClassVar[bool] = True

    target: Annotated[Index | None, Field(description="class to be seen instead; null: any wrong one")] = None
    queries: Annotated[int, Field(ge=1, description="forward passes for an image, at most, in each restart")] = 5000
    loss: Annotated[
        Literal["logits", "cross-entropy", "margin"] | None,
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

    def attempts(self, inputs: ImageAttackInputs) -> Iterator[Attempt]:
        """One search from each start, at places drawn anew; the model is only asked for its outputs."""
        count, image_size, size = len(inputs.images), inputs.image_size, inputs.size
        targeted = self.target is not None
        search = RandomSearch(
            problem=inputs.problem(self.target, loss=self.loss or ("cross-entropy" if targeted else "margin")),
            draw_corners=lambda: self.corners(count, image_size, size, generator=inputs.generator),
            allowed_corners=AllowedCorners.outside(self.keep_out, image_size, size) if self.place == "random" else None,
            queries=self.queries,
            alpha=self.alpha or (0.1 if targeted else 0.4),
            move_every=self.move_every or (10 if targeted else 4),
            generator=inputs.generator,
        )
        return (search.run() for _ in range(self.restarts))


_START_SQUARES = 1000
_ENOUGH_SQUARES_A_PIXEL = 8
_SCHEDULE = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""After so many queries of 10,000 the share of the patch that a change covers is halved once more."""
_FIRST_REACH = 0.75
_CHANNELS = 3


@dataclass(frozen=True, kw_only=True)
class RandomSearch:
    """A search for the patch and the place of every image.

    Args:
        problem: images and aim.
        draw_corners: random corners (N, 2) to start at.
        allowed_corners: where patches may move; None: they stay.
        queries: forward passes for an image, at most.
        alpha: share of the patch that a change covers at first.
        move_every: queries between tries to move.
        generator: draws starts, changes and moves, for every image alike whether it is done or not: what is drawn for
            one image does not depend on how the others do.
    """

    problem: PatchProblem
    draw_corners: Callable[[], Tensor]
    allowed_corners: AllowedCorners | None
    queries: int
    alpha: float
    move_every: int
    generator: torch.Generator

    @torch.no_grad()
    def run(self) -> Attempt:
        """Searches until every image is a success or the queries are spent."""
        patches = self._start()
        corners = self.draw_corners().to(patches.device, copy=True)
        best = self.problem.attempt(patches, corners)
        for query in range(1, self.queries):
            left = (~best.success).nonzero().squeeze(1)
            if len(left) == 0:
                break
            new_patches, new_corners = self._change(patches, corners, query)
            tried = self.problem.only(left).attempt(new_patches[left], new_corners[left])
            accepted = tried.beats(best.only(left))
            index = left[accepted]
            patches[index], corners[index] = new_patches[index], new_corners[index]
            best = best.updated(index, tried.only(accepted))
        return best

    def sides(self, query: int) -> tuple[int, int]:
        """Height and width in pixels of the square that is changed in a query."""
        spent = int(query / self.queries * 10_000)
        share = self.alpha / 2 ** sum(spent > mark for mark in _SCHEDULE)
        height, width = self._size
        return max(1, int(math.sqrt(share) * height)), max(1, int(math.sqrt(share) * width))

    @cached_property
    def single_channels_from(self) -> int:
        """The query from which on a change is one channel of one pixel: half of what is left when squares are done."""
        first = next((query for query in range(self.queries) if self.sides(query) == (1, 1)), self.queries)
        return first + (self.queries - first) // 2

    @property
    def _size(self) -> tuple[int, int]:
        return self.problem.mask.shape[0], self.problem.mask.shape[1]

    def _draw(self, low: int, high: int, *shape: int) -> Tensor:
        """Uniform integers from low to below high."""
        device = self.problem.images.device
        return torch.randint(low, high, shape, generator=self.generator, device=self.generator.device).to(device)

    def _start(self) -> Tensor:
        """Patches (N, 3, h, w) painted over with small squares of random colors."""
        count, (height, width) = len(self.problem.images), self._size
        patches = self.problem.images.new_zeros(count, _CHANNELS, height, width)
        largest = max(1, math.ceil(math.sqrt(min(height, width))) - 1)
        # Where patches are small the rest would only cover each other.
        for _ in range(min(_START_SQUARES, _ENOUGH_SQUARES_A_PIXEL * height * width)):
            side = self._draw(1, largest + 1, count)
            patches = torch.where(self._window(side, side), self._colors(), patches)
        return patches

    def _change(self, patches: Tensor, corners: Tensor, query: int) -> tuple[Tensor, Tensor]:
        """Patches and corners to try next: either are changed, in every image."""
        left = 1 - query / self.queries
        rows, columns = (int(_FIRST_REACH * left * side) for side in self.problem.images.shape[-2:])
        if self.allowed_corners is not None and query % self.move_every == 0 and (rows or columns):
            offsets = [self._draw(-reach, reach + 1, len(corners)) for reach in (rows, columns)]
            return patches, self.allowed_corners.shifted(corners, torch.stack(offsets, 1))
        height, width = (corners.new_full((len(corners),), side) for side in self.sides(query))
        window = self._window(height, width)
        if self.sides(query) != (1, 1):
            return torch.where(window, self._colors(), patches), corners
        return torch.where(window & self._flips(query), 1 - patches, patches), corners

    def _window(self, heights: Tensor, widths: Tensor) -> Tensor:
        """Boolean (N, 1, h, w): one rectangle of the given size (N,) anywhere in each patch."""
        inside = [self._span(sides, length) for sides, length in zip((heights, widths), self._size, strict=True)]
        return inside[0][:, None, :, None] & inside[1][:, None, None, :]

    def _span(self, sides: Tensor, length: int) -> Tensor:
        """Boolean (N, length): a run of so many pixels anywhere."""
        first = self._uniform(length - sides + 1)[:, None]
        pixels = torch.arange(length, device=sides.device)
        return (pixels >= first) & (pixels < first + sides[:, None])

    def _uniform(self, highs: Tensor) -> Tensor:
        """(N,) uniform integers from 0 to below each of `highs`."""
        drawn = torch.rand(len(highs), generator=self.generator, device=self.generator.device).to(highs.device)
        # The product may round up to the bound itself.
        return torch.minimum((drawn * highs).long(), highs - 1)

    def _colors(self) -> Tensor:
        return self._draw(0, 2, len(self.problem.images), _CHANNELS, 1, 1).to(self.problem.images)

    def _flips(self, query: int) -> Tensor:
        """Boolean (N, 3, 1, 1): the channels to invert: one, or any so that the color is another one."""
        channels = torch.arange(_CHANNELS, device=self.problem.images.device)
        if query >= self.single_channels_from:
            flips = self._draw(0, _CHANNELS, len(self.problem.images))[:, None] == channels
        else:
            flips = (self._draw(1, 2**_CHANNELS, len(self.problem.images))[:, None] >> channels) & 1 == 1
        return flips[:, :, None, None]
