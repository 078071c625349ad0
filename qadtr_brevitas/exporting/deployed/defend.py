"""Predictions that hold under a patch, and which of them are certified; `run.py --defend` is how to call it.

The image is seen under the masks of masks.npz, of which one covers any patch of the size that they are made for. Double
masking (PatchCleanser, Xiang et al. 2022): where all masks agree, that is the class; else the class of a mask that
disagrees with most, if no second mask changes it; else the class of most masks. It is certified where all pairs of
masks show it too. Where masks overlap, the masks that cover the same places stand for one mask: their logits are
averaged. One round: the class on which all masks over some place agree; certified where all masks agree.

It needs numpy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np

# Masked images that are run at once.
BATCH = 32


@dataclass(frozen=True)
class Answer:
    """What is said of one image.

    Args:
        label: number of its class.
        certified: whether no patch of the size that is put on this image changes the class.
        passes: how many masked images were run.
    """

    label: int
    certified: bool
    passes: int


class Defense:
    """A network behind masks.

    Args:
        run: images as the file takes them, (n, C, H, W), to logits (n, classes).
        path: masks.npz.
    """

    def __init__(self, run: Callable[[Any], Any], path: Path) -> None:
        stored = np.load(path)
        # (M, H, W), True where an image is covered; (C,), the mean color.
        self.masks, self.color = stored["masks"], stored["color"].astype(np.float32)
        # Covered pixels are interpolated between so many levels of one unit; None: they show the mean color.
        self.levels = stored.get("levels")
        # Sets of masks that cover one place, (kinds, M), for one round only.
        self.kinds = stored.get("kinds")
        # Views whose logits are averaged: mirrored or not, and pixels to the right and down; None: the image alone.
        self.views = stored.get("views", np.zeros((1, 2), np.int64))
        # Numbers of the masks whose logits are averaged, (groups, K); without overlap each mask by itself.
        self.members = stored.get("members", np.arange(len(self.masks))[:, None])
        self._network = run

    def __call__(self, image: Any) -> Answer:
        """Classify an image as the file takes it, (C, H, W)."""
        seen = _Masked(self._run, image, self.masks, self._cover, self.members)
        logits = seen.under_each()
        votes = logits.argmax(1)
        majority = int(np.bincount(votes).argmax())
        unanimous = bool((votes == majority).all())
        if self.kinds is not None:
            label, certified = _agreed(votes, self.kinds, majority), unanimous
        elif unanimous:
            label, certified = majority, seen.stands(_least_sure_first(logits), majority)
        else:
            label, certified = _second_round(seen, votes, majority), False
        return Answer(label, certified, seen.passes * len(self.views))

    def _run(self, images: Any) -> Any:
        """Return the mean of the logits over the views of images (n, C, H, W)."""
        return sum(self._network(_view(images, *view)) for view in self.views.tolist()) / len(self.views)

    def _cover(self, image: Any, covered: Any) -> Any:
        """Return an image (C, H, W) under masks, (n, C, H, W), of booleans (n, 1, H, W)."""
        color = self.color[:, None, None]
        shown = color if self.levels is None else _interpolated(image, covered, color, self.levels)
        return np.where(covered, shown, image).astype(np.float32)


class _Masked:
    """An image under pairs of groups of masks, given by their numbers; each pair of masks is run once."""

    def __init__(
        self, run: Callable[[Any], Any], image: Any, masks: Any, cover: Callable[[Any, Any], Any], members: Any
    ) -> None:
        self.run, self.image, self.masks, self.cover, self.members = run, image, masks, cover, members
        self._known: dict[tuple[int, int], Any] = {}

    @property
    def passes(self) -> int:
        """How many masked images were run."""
        return len(self._known)

    def under_each(self) -> Any:
        """Return the logits under each group alone, (groups, classes)."""
        alone = self._logits([(mask, mask) for mask in range(len(self.masks))])
        return alone[self.members].mean(1)

    def stands(self, pairs: list[tuple[int, int]], label: int) -> bool:
        """Return whether the image has a class under all pairs of groups; it is run until one shows another class."""
        parts = (pairs[start : start + BATCH] for start in range(0, len(pairs), BATCH))
        return all((self._under(part).argmax(1) == label).all() for part in parts)

    def _under(self, pairs: list[tuple[int, int]]) -> Any:
        """Return the logits under each pair of groups, (pairs, classes): the mean over pairs of a mask of each."""
        masks = [list(product(self.members[one].tolist(), self.members[two].tolist())) for one, two in pairs]
        logits = self._logits([pair for group in masks for pair in group])
        return logits.reshape(len(pairs), -1, logits.shape[1]).mean(1)

    def _logits(self, pairs: list[tuple[int, int]]) -> Any:
        """Return the logits under each pair of masks, (pairs, classes); a mask with itself is that mask alone."""
        ordered = [(min(pair), max(pair)) for pair in pairs]
        new = [pair for pair in dict.fromkeys(ordered) if pair not in self._known]
        for start in range(0, len(new), BATCH):
            part = new[start : start + BATCH]
            first, second = (np.array(side) for side in zip(*part, strict=True))
            covered = (self.masks[first] | self.masks[second])[:, None]
            self._known.update(zip(part, self.run(self.cover(self.image, covered)), strict=True))
        return np.stack([self._known[pair] for pair in ordered])


def _view(images: Any, mirrored: int, pixels: int) -> Any:
    """Return images moved right and down, their first row and column repeated, and then mirrored."""
    height, width = images.shape[2:]
    moved = np.pad(images, ((0, 0), (0, 0), (pixels, 0), (pixels, 0)), mode="edge")[..., :height, :width]
    return np.ascontiguousarray(moved[..., ::-1] if mirrored else moved)


def _interpolated(image: Any, covered: Any, color: Any, levels: Any) -> Any:
    """Return the mean of the nearest visible pixels on four sides, weighted by the inverse of their distance.

    In a pixel that has none the color is seen. Each step is that of PyTorch, so that both round to the same level.
    """
    pixels = np.broadcast_to(np.rint(image.astype(np.float32) * levels), (len(covered), *image.shape))
    total, weights = np.zeros_like(pixels), np.zeros(covered.shape, np.float32)
    for axis in (2, 3):
        for place, distance in _nearest_visible(covered, axis):
            weight = np.where(distance > 0, 1 / np.maximum(distance, 1).astype(np.float32), np.float32(0))
            total = total + weight * np.take_along_axis(pixels, np.broadcast_to(place, pixels.shape), axis)
            weights = weights + weight
    mean = np.rint(total / np.maximum(weights, np.finfo(np.float32).tiny))
    return np.where(weights > 0, mean / levels, color)


def _nearest_visible(covered: Any, axis: int) -> list[tuple[Any, Any]]:
    """Return places and distances of the nearest visible pixels before and after each; distance 0 where none is."""
    length = covered.shape[axis]
    here = np.moveaxis(np.broadcast_to(np.arange(length), np.moveaxis(covered, axis, -1).shape), -1, axis)
    before = np.maximum.accumulate(np.where(covered, -1, here), axis)
    after = np.flip(np.minimum.accumulate(np.flip(np.where(covered, length, here), axis), axis), axis)
    return [
        (np.maximum(before, 0), np.where(before < 0, 0, here - before)),
        (np.minimum(after, length - 1), np.where(after == length, 0, after - here)),
    ]


def _least_sure_first(logits: Any) -> list[tuple[int, int]]:
    """Return all pairs of masks, those with the smallest margins first: most images that fail do so there."""
    highest = np.sort(logits, axis=1)
    margins = highest[:, -1] - highest[:, -2] if logits.shape[1] > 1 else highest[:, -1]
    return sorted(combinations(range(len(logits)), 2), key=lambda pair: margins[pair[0]] + margins[pair[1]])


def _second_round(seen: _Masked, votes: Any, majority: int) -> int:
    for first in np.flatnonzero(votes != majority):
        others = [(int(first), second) for second in range(len(votes)) if second != first]
        if seen.stands(others, int(votes[first])):
            return int(votes[first])
    return majority


def _agreed(votes: Any, kinds: Any, majority: int) -> int:
    """Return the class on which all masks over some place agree, or else that of most masks."""
    over = (votes[kind] for kind in kinds)
    agreed = [int(one[0]) for one in over if (one == one[0]).all()]
    return max(agreed, default=majority)
