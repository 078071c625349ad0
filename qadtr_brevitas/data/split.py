"""Splits of a data set: labeled images in memory as bytes, class-balanced subsets, and the order of an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from unicodedata import normalize

import torch
from PIL import Image
from torch import Tensor

from qadtr_brevitas.core.errors import DataError, UsageError
from qadtr_brevitas.core.files import fingerprint_tensors
from qadtr_brevitas.core.seeding import generator

SPLITS = ("train", "test")


@dataclass(frozen=True, eq=False)
class Split:
    """Images with labels, as uint8: four times smaller than float32, and exact.

    Args:
        images: uint8 (N, C, H, W), RGB if C is 3.
        labels: int64 (N,), indices into `classes`.
        classes: names of the classes.
        drawn_from: how many images these were drawn from; None for all there are.

    Raises:
        DataError: other shapes or types, or a label that is not an index into `classes`.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    drawn_from: int | None = None

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[1] < 1:
            given = f"{self.images.dtype} {tuple(self.images.shape)}"
            raise DataError(f"images are {given}: a split holds torch.uint8 of shape (N, C, H, W)")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            given = f"{self.labels.dtype} {tuple(self.labels.shape)}"
            raise DataError(
                f"labels are {given}: a split holds one torch.int64 for each of its {len(self.images)} images"
            )
        if len(self) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise DataError(
                f"labels are not all in 0..{len(self.classes) - 1}, but there are {len(self.classes)} classes"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def available(self) -> int:
        """How many images the data set has, of which these may be only some."""
        return len(self) if self.drawn_from is None else self.drawn_from

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.images.shape[2:]
        return height, width

    @property
    def channels(self) -> int:
        """Numbers of each pixel."""
        return self.images.shape[1]

    @property
    def fingerprint(self) -> str:
        """32 hex digits that differ for other images or labels."""
        return fingerprint_tensors([self.images, self.labels])

    def batch(self, indices: Tensor, *, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Return the chosen images as float32 (n, C, H, W) in [0, 1], with labels int64 (n,), on `device`.

        Args:
            indices: int64 (n,), on the CPU.
            device: where the result is wanted.
        """
        images = self.images[indices].to(device, non_blocking=True)
        return images.float().div_(255), self.labels[indices].to(device, non_blocking=True)

    def batches(self, size: int, *, device: torch.device | str = "cpu") -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield all images in order, as indices (n,) on the CPU and what `batch` returns for them.

        Args:
            size: images of a batch; the last one may have fewer.
            device: where the images and labels are wanted.
        """
        for indices in torch.arange(len(self)).split(size):
            yield (indices, *self.batch(indices, device=device))

    def pixels(self, index: int) -> Tensor:
        """Return one image as it is, uint8 (C, H, W)."""
        return self.images[index]

    def picture(self, index: int) -> Image.Image:
        """Return one image for transforms of Pillow.

        Raises:
            UsageError: images have neither one channel nor three.
        """
        if self.channels not in (1, 3):
            raise UsageError(f"images of {self.channels} channels are no pictures: give data.transform=null")
        pixels = self.pixels(index).permute(1, 2, 0).numpy()
        return Image.fromarray(pixels if self.channels == 3 else pixels[:, :, 0])

    def whole_picture(self, index: int) -> Image.Image:
        """Return one image as `picture`, before it was resized and cropped where that is still known."""
        return self.picture(index)

    def pop_damaged(self) -> list[str]:
        """Return what was wrong with images that were replaced since the last call; images in memory are whole."""
        return []

    def subset(self, indices: Tensor, *, drawn_from: int | None = None) -> Split:
        """Return the chosen images only; `classes` stays whole, so labels keep their meaning.

        Args:
            indices: int64 (n,), on the CPU.
            drawn_from: how many images these were drawn from; None for as many as this split was drawn from.
        """
        drawn_from = self.drawn_from if drawn_from is None else drawn_from
        return replace(self, images=self.images[indices], labels=self.labels[indices], drawn_from=drawn_from)

    def balanced(self, count: int, *, seed: int) -> Split:
        """`count` images drawn at random, equally many of each class as far as there are enough.

        Raises:
            UsageError: fewer than 1 or more than all images wanted.
        """
        self._check_count(count)
        return self.subset(balanced_indices(self.labels, count, seed=seed), drawn_from=self.available)

    def limited(self, limit: int | None, *, seed: int) -> Split:
        """`limit` images as `balanced` draws them, or all where there are no more or the limit is None."""
        return self if limit is None or limit >= len(self) else self.balanced(limit, seed=seed)

    def divide(self, count: int, *, seed: int) -> tuple[Split, Split]:
        """Divides into `count` class-balanced random images and the rest, both in the order they have here.

        Raises:
            UsageError: fewer than 1 or more than all images wanted.
        """
        self._check_count(count)
        chosen = torch.zeros(len(self), dtype=torch.bool)
        chosen[_drawn(self.labels, count, seed)] = True
        return self.subset(chosen.nonzero().flatten()), self.subset((~chosen).nonzero().flatten())

    def _check_count(self, count: int) -> None:
        if not 1 <= count <= len(self):
            raise UsageError(f"{count} images cannot be drawn from {len(self)}: give a number from 1 to {len(self)}")


def numbered(count: int) -> tuple[str, ...]:
    """Names for classes that have none."""
    return tuple(map(str, range(count)))


def differing_class(expected: Sequence[str], given: Sequence[str]) -> int | None:
    """Return the first class that goes by another name; None if none does, or one side has only numbers."""
    # What an earlier release recorded may be in another Unicode form.
    expected, given = ([normalize("NFC", name) for name in names] for names in (expected, given))
    if list(numbered(len(expected))) in (expected, given):
        return None
    return next((label for label, (a, b) in enumerate(zip(expected, given, strict=True)) if a != b), None)


def balanced_indices(labels: Tensor, count: int, *, seed: int) -> Tensor:
    """Which of the images `Split.balanced` takes, so that no others need be read.

    Args:
        labels: int64 (N,).
        count: how many, from 1 to N.
        seed: decides which.

    Returns:
        int64 (count,), ascending.
    """
    return _drawn(labels, count, seed).sort().values


def balanced_order(labels: Tensor, *, seed: int) -> Tensor:
    """All images in the order in which `Split.balanced` takes them: its first n are those of any n.

    Args:
        labels: int64 (N,).
        seed: decides the order.

    Returns:
        int64 (N,).
    """
    return _drawn(labels, len(labels), seed)


def _drawn(labels: Tensor, count: int, seed: int) -> Tensor:
    """Take one random image of every class, then a second, and so on, until there are enough."""
    shuffled = torch.randperm(len(labels), generator=generator(seed, "balanced"))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    sizes = labels.bincount()
    first_of_class = sizes.cumsum(0) - sizes
    turn = torch.empty_like(labels)
    turn[by_class] = torch.arange(len(labels)) - first_of_class[labels[by_class]]
    return shuffled[turn[shuffled].argsort(stable=True)[:count]]


def epoch_order(count: int, *, seed: int, epoch: int) -> Tensor:
    """Return a random permutation of 0..count-1, int64, the same whenever seed and epoch are."""
    return torch.randperm(count, generator=generator(seed, "order", epoch))


def check_split(split: str) -> None:
    """Raise if a split is neither "train" nor "test".

    Raises:
        UsageError: the split is neither "train" nor "test".
    """
    if split not in SPLITS:
        raise UsageError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
