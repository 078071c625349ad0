"""When one attack is better than another: by more than a threshold, and by more than chance.

All attacks of an audit meet the same images, so two of them are compared image by image with McNemar's test (1947):
if neither is better, an image that only one of them breaks is equally likely to be broken by either. The noise is the
difference of their counts that chance exceeds in one case of a thousand, by the normal distribution. It is a number
that is printed beside the gain; the exact test (scipy's binomtest) gives a p-value instead, and in borderline cases
needs one image more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

from torch import Tensor

FALSE_ALARM = 0.001
"""How often a check may warn of a difference that is not there; shared out among the comparisons of a check."""


def deviations(comparisons: int = 1) -> float:
    """Return how many standard deviations the largest of so many differences has to be."""
    return NormalDist().inv_cdf(1 - FALSE_ALARM / comparisons)


def resolution(images: int) -> float:
    """Return the smallest difference between two attacks, as a share of the images, that is more than noise."""
    count = math.floor(deviations() ** 2) + 1
    return count / images


@dataclass(frozen=True)
class AsrGain:
    """By how much the success rate (ASR) of one attack is higher than that of another.

    Args:
        value: difference of the success rates.
        noise: difference that chance could make.
    """

    value: float
    noise: float

    @classmethod
    def of(cls, other: Tensor, base: Tensor, *, comparisons: int = 1) -> AsrGain:
        """Compare the images that two attacks break, both boolean (N,) with N > 0."""
        more, less = int((other & ~base).sum()), int((base & ~other).sum())
        return cls((more - less) / len(base), deviations(comparisons) * math.sqrt(more + less) / len(base))

    def exceeds(self, threshold: float) -> bool:
        """Return whether the gain is more than the threshold and more than noise."""
        return self.value > max(threshold, self.noise)


@dataclass(frozen=True)
class AttackComparison:
    """Several attacks against one.

    Args:
        numbers: success rates of all, and the clearest gain with its noise.
        best: name of the attack with the clearest gain.
        gain: that gain.
        is_better: whether that gain exceeds threshold and noise.
    """

    numbers: dict[str, float]
    best: str
    gain: AsrGain
    is_better: bool


def compare(base: Tensor, others: Mapping[str, Tensor], *, base_name: str, threshold: float = 0.0) -> AttackComparison:
    """Compare attacks with a base by the images they break, all boolean (N,) with N > 0.

    Args:
        base: images that the base breaks.
        others: the same for other attacks, at least one, by name.
        base_name: name of the base in the numbers.
        threshold: gain that does not matter, as a share.
    """
    gains = {name: AsrGain.of(other, base, comparisons=len(others)) for name, other in others.items()}
    best = max(gains, key=lambda name: gains[name].value - gains[name].noise)
    numbers = {f"asr {base_name}": rate(base)} | {f"asr {name}": rate(other) for name, other in others.items()}
    numbers |= {"gain": gains[best].value, "noise": gains[best].noise}
    return AttackComparison(numbers, best, gains[best], gains[best].exceeds(threshold))


def rate(broken: Tensor) -> float:
    """Return the share of images that are broken."""
    return broken.float().mean().item()
