"""How similar two tensors of each image are, and means of such numbers over images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# The 97.5 % quantile of the normal distribution, for two-sided 95 % intervals.
_NORMAL_QUANTILE = 1.96


@dataclass(frozen=True)
class Average:
    """A mean over images with its 95 % interval.

    Args:
        value: the mean; None of no images.
        low: lower end of the interval; None if there is no interval.
        high: upper end of the interval.
        n: number of images.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, values: Tensor) -> Average:
        """Return the mean of (n,) values, with an interval by the normal approximation."""
        n = len(values)
        if n == 0:
            return cls(None, None, None, 0)
        value = float(values.mean())
        if n == 1:
            return cls(value, None, None, 1)
        margin = _NORMAL_QUANTILE * float(values.std()) / n**0.5
        return cls(value, value - margin, value + margin, n)


def cosines(tensors: Tensor, reference: Tensor, region: Tensor) -> Tensor:
    """Return the cosine of the angle between two tensors of every image, (n,) with n <= N.

    Images for which one of the tensors is zero are left out.

    Args:
        tensors: (N, C, H, W).
        reference: (N, C, H, W).
        region: boolean (N, 1, H, W), the pixels that count.
    """
    first, second = ((tensor * region).flatten(1).cpu().double() for tensor in (tensors, reference))
    norms = first.norm(dim=1) * second.norm(dim=1)
    nonzero = norms > 0
    return (first * second).sum(dim=1)[nonzero] / norms[nonzero]


def squared_errors(tensors: Tensor, reference: Tensor, region: Tensor) -> tuple[Tensor, float | None]:
    """Return mean squared errors, and their total relative to the reference.

    The relative error shows what the errors alone do not: gradients of confident images are tiny, and so are their
    errors.

    Args:
        tensors: (N, C, H, W).
        reference: (N, C, H, W).
        region: boolean (N, 1, H, W), the pixels that count.

    Returns:
        The mean squared error of every image, (N,); and the sum of all squared errors divided by the sum of all squared
        values of the reference, None if the reference is zero.
    """
    errors = ((tensors - reference) * region).flatten(1).cpu().double().square().sum(dim=1)
    squares = float((reference * region).flatten(1).cpu().double().square().sum())
    values = region.flatten(1).sum(dim=1).cpu() * tensors.shape[1]
    return errors / values, float(errors.sum()) / squares if squares else None
