"""How alike two maps are in structure: overlap of their edges, and cosine of their oriented gradients.

Everything is differentiable twice, so that the structure of input gradients can be trained.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, conv2d, cosine_similarity

from qadtr_brevitas.core.errors import UsageError

_SOBEL = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
# An edge is what exceeds this quantile of a map, softly.
_QUANTILE, _SHARPNESS = 0.85, 100.0
_BINS, _CELLS, _CONCENTRATION = 9, 4, 8.0
# Keeps roots and quotients differentiable where a map is flat; maps are scaled to slopes of at most 1.
_EPS = 1e-6


def structural_similarity(one: Tensor, other: Tensor) -> Tensor:
    """Return edge overlap plus cosine of oriented gradients, the mean over the images; from 0 to 2.

    Args:
        one: (N, C, H, W), at least 3x3; channels count by the mean of their magnitudes.
        other: of the same shape.

    Raises:
        UsageError: these are no maps of at least 3x3.
    """
    first, second = slopes(one), slopes(other)
    return (edge_overlap(first, second) + oriented_cosine(first, second)).mean()


def slopes(maps: Tensor) -> Tensor:
    """Return horizontal and vertical Sobel slopes (N, 2, H - 2, W - 2), at most 1 long in each image.

    Raises:
        UsageError: the maps are not (N, C, H, W) of at least 3x3.
    """
    if maps.ndim != 4 or min(maps.shape[-2:]) < 3:
        raise UsageError(
            f"features of shape {tuple(maps.shape)} have no edges: name layers whose outputs are maps (N, C, H, W) of "
            "at least 3x3"
        )
    kernels = torch.stack([_SOBEL, _SOBEL.T])[:, None].to(maps.device, torch.promote_types(maps.dtype, torch.float32))
    with torch.autocast(maps.device.type, enabled=False):
        found = conv2d(maps.abs().mean(1, keepdim=True).to(kernels.dtype), kernels)
    longest = found.detach().square().sum(1).amax((1, 2)).sqrt()
    return found / longest.clamp(min=torch.finfo(found.dtype).tiny)[:, None, None, None]


def edge_overlap(one: Tensor, other: Tensor) -> Tensor:
    """Return the soft Dice overlap (N,) of the edges of two maps, from 0 to 1.

    Args:
        one: slopes (N, 2, H, W).
        other: slopes of the same shape.
    """
    first, second = _edges(one), _edges(other)
    return 2 * (first * second).sum((1, 2)) / ((first + second).sum((1, 2)) + _EPS)


def oriented_cosine(one: Tensor, other: Tensor) -> Tensor:
    """Return the cosine (N,) of the soft histograms of oriented gradients of two maps, from 0 to 1.

    Args:
        one: slopes (N, 2, H, W).
        other: slopes of the same shape.
    """
    return cosine_similarity(_histograms(one), _histograms(other), dim=1, eps=_EPS)


def _edges(slopes: Tensor) -> Tensor:
    """(N, H, W) from 0 to 1: sigmoid(k (A - tau)) of the length A, tau its 85th percentile in the image."""
    length = _length(slopes)
    threshold = length.detach().flatten(1).quantile(_QUANTILE, dim=1)
    return torch.sigmoid(_SHARPNESS * (length - threshold[:, None, None]))


def _histograms(slopes: Tensor) -> Tensor:
    """(N, bins * cells): lengths by orientation without sign, averaged over 4x4 cells."""
    x, y = slopes.unbind(1)
    length = _length(slopes)
    squared = length.square()
    # Cosine and sine of twice the angle need no arcus tangent, whose derivative has poles.
    cosine, sine = (x.square() - y.square()) / squared, 2 * x * y / squared
    angles = torch.arange(_BINS, device=x.device, dtype=x.dtype) * (2 * math.pi / _BINS)
    agreement = cosine[:, None] * angles.cos()[:, None, None] + sine[:, None] * angles.sin()[:, None, None]
    weighted = length[:, None] * (_CONCENTRATION * agreement).softmax(1)
    return adaptive_avg_pool2d(weighted, (min(_CELLS, x.shape[1]), min(_CELLS, x.shape[2]))).flatten(1)


def _length(slopes: Tensor) -> Tensor:
    return (slopes.square().sum(1) + _EPS).sqrt()
