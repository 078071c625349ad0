"""Scores of an attack from predicted classes alone, each with its denominator and a 95 % Wilson interval.

The definitions are those that leave out what an attack cannot take credit for: images the model gets wrong anyway,
and, for a targeted attack, images that show the target class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from torch import Tensor

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Proportion:
    """A count over its denominator.

    Args:
        count: images that have the property.
        n: images that could have it.
    """

    count: int
    n: int

    def __post_init__(self) -> None:
        assert 0 <= self.count <= self.n, f"{self.count} of {self.n} is no share"

    @property
    def value(self) -> float | None:
        """The share in [0, 1]; None where the denominator is zero."""
        return self.count / self.n if self.n else None

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval, in [0, 1]; (0, 1) where the denominator is zero."""
        return wilson(self.count, self.n)


@dataclass(frozen=True)
class Score:
    """What one patch does to one model at one precision.

    Args:
        asr: successes over the images that are classified correctly without the patch and, for a targeted attack, do
            not show the target class.
        asr_all: successes over all images, whatever their class and clean prediction.
        untargeted: wrong with the patch over the images classified correctly without it (same as `asr` for an
            untargeted attack).
        clean_accuracy: correct without the patch over all images.
        robust_accuracy: correct both without and with the patch over all images.
    """

    asr: Proportion
    asr_all: Proportion
    untargeted: Proportion
    clean_accuracy: Proportion
    robust_accuracy: Proportion


def score(clean: Tensor, patched: Tensor, labels: Tensor, *, target: int | None) -> Score:
    """Score predictions with a patch against those without it.

    Args:
        clean: (N,) classes predicted without the patch.
        patched: (N,) classes predicted with the patch, same images and order.
        labels: (N,) true classes.
        target: class a success must show; None counts any wrong class.
    """
    assert clean.shape == patched.shape == labels.shape, "predictions and labels are of different images"
    correct, wrong, images = clean == labels, patched != labels, len(labels)
    untargeted = _share(wrong, correct)
    if target is None:
        asr, successes = untargeted, wrong
    else:
        successes = patched == target
        asr = _share(successes, correct & (labels != target))
    return Score(
        asr=asr,
        asr_all=Proportion(int(successes.sum()), images),
        untargeted=untargeted,
        clean_accuracy=Proportion(int(correct.sum()), images),
        robust_accuracy=Proportion(int((correct & ~wrong).sum()), images),
    )


def accuracy(predictions: Tensor, labels: Tensor) -> Proportion:
    """Share of (N,) predictions that equal the (N,) labels."""
    return Proportion(int((predictions == labels).sum()), len(labels))


# Reports ask for the same few intervals hundreds of times, and binomtest computes a p-value with each.
@cache
def wilson(count: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of `count` of `n`; (0, 1), i.e. nothing known, for n = 0."""
    from scipy.stats import binomtest

    if n == 0:
        return 0.0, 1.0
    interval = binomtest(count, n).proportion_ci(CONFIDENCE, method="wilson")
    # Rounding can put a bound beside the value it has to include.
    return min(float(interval.low), count / n), max(float(interval.high), count / n)


@dataclass(frozen=True)
class Mean:
    """Several shares of the same images as one figure, for instance one patch for each target class.

    Args:
        value: mean of the shares, in [0, 1].
        low: the smallest share.
        high: the largest share.
        interval: 95 % Wilson interval of the mean over the smallest denominator. All shares count the same images, so
            adding their denominators up would make it too narrow.
        n: smallest and largest denominator.
        shares: how many shares.
    """

    value: float
    low: float
    high: float
    interval: tuple[float, float]
    n: tuple[int, int]
    shares: int


def mean(shares: Sequence[Proportion]) -> Mean | None:
    """Mean of shares that count the same images; None where no share has a value."""
    counted = [share for share in shares if share.n]
    if not counted:
        return None
    values = [share.count / share.n for share in counted]
    sizes = [share.n for share in counted]
    value = sum(values) / len(values)
    low, high = wilson(round(value * min(sizes)), min(sizes))
    return Mean(
        value, min(values), max(values), (min(low, value), max(high, value)), (min(sizes), max(sizes)), len(values)
    )


def _share(successes: Tensor, among: Tensor) -> Proportion:
    return Proportion(int((successes & among).sum()), int(among.sum()))
