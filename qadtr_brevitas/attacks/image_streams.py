"""Random numbers for each image of its own, so that no image's draws depend on what else is in its batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Of SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators"), as signed 64-bit integers.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_FACTORS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))
_BITS = 24
"""Bits of a uniform number: as many as a float32 holds exactly."""


@dataclass
class ImageStreams:
    """A stream of random numbers for each of several images, drawn for all of them at once.

    What an image gets depends on its seed and on the draws before only. It is the same on every device.

    Args:
        seeds: (N,) int64, one for each image.
        drawn: how many numbers each image has had.
    """

    seeds: Tensor
    drawn: int = field(default=0)

    @classmethod
    def of(cls, seed: int, indices: Sequence[int], *, device: torch.device | str = "cpu") -> ImageStreams:
        """Return the streams of the images with these indices in their data set."""
        numbers = torch.tensor(list(indices), dtype=torch.int64, device=device)
        return cls(_mixed(_mixed(numbers) ^ _signed(seed)))

    def subset(self, index: Tensor) -> ImageStreams:
        """Return the streams of some of the images, which go on where these are."""
        return ImageStreams(self.seeds[index], self.drawn)

    def branch(self, number: int) -> ImageStreams:
        """Return streams of their own for a part of an attack, whatever was drawn before."""
        return ImageStreams(_mixed(self.seeds ^ _signed((number + 1) * _STEP)))

    def uniform(self, *shape: int) -> Tensor:
        """Draw uniform numbers in [0, 1), float32; the first number of the shape is that of the images.

        Returns:
            (N, ...), by `shape`.
        """
        count = math.prod(shape[1:])
        numbers = torch.arange(self.drawn, self.drawn + count, device=self.seeds.device)
        self.drawn += count
        bits = _mixed(self.seeds[:, None] + (numbers + 1) * _STEP)
        return (_shifted(bits, 64 - _BITS).float() / 2**_BITS).view(len(self.seeds), *shape[1:])

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Draw uniform integers from `low` to below `high`, int64, in the given shape (N, ...)."""
        return low + (self.uniform(*shape).double() * (high - low)).long()


def _mixed(values: Tensor) -> Tensor:
    """Return 64-bit numbers that look random, one for each integer; products wrap around."""
    for shift, factor in _FACTORS:
        values = (values ^ _shifted(values, shift)) * factor
    return values


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Return values shifted to the right, filled up with zeros and not with the sign."""
    return (values >> bits) & (2 ** (64 - bits) - 1)


def _signed(value: int) -> int:
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value
