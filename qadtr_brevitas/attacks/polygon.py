"""Polygons from rays: a shape that gradients can change (Chen et al., ECCV 2022, Deformable Patch Representation).

R rays of lengths r_i leave the middle O of a window at the angles 2 pi i / R, counted from the columns' direction
towards the rows'. The polygon through their ends is star-shaped around O, so it has no holes, and its boundary in the
sector of rays i and i + 1, at the angle a behind ray i and with D = 2 pi / R, lies at the distance

    r_i r_(i+1) sin D / (r_i sin a + r_(i+1) sin(D - a)).

Lengths are in pixels, from center to center. Every function also takes many polygons at once: rays (..., R).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qadtr_brevitas.core.errors import UsageError

_FEWEST_RAYS = 3

_SAME = 1e-4
"""Pixels whose u differ relatively by less are taken to come at once."""


def polygon_mask(rays: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the pixels whose center lies in the polygon.

    Args:
        rays: (..., R), positive.
        size: (h, w) of the window, in pixels.

    Returns:
        Boolean (..., h, w).

    Raises:
        UsageError: fewer than three rays.
    """
    return distance_ratios(rays, size) <= 1


def soft_polygon_mask(rays: Tensor, size: tuple[int, int], *, sharpness: float) -> Tensor:
    """Return the polygon with a blurred border, differentiable in the rays: (tanh(s (1 - u)) + 1) / 2.

    u is a pixel's distance from the middle over the boundary's in its direction; the paper's lambda is -s. The border
    is about r / s pixels wide: where it is much narrower than a pixel, most rays get no gradient.

    Args:
        rays: (..., R), positive.
        size: (h, w) of the window, in pixels.
        sharpness: s, positive.

    Returns:
        (..., h, w) in [0, 1]; at least 0.5 where `polygon_mask` is True and nowhere else.

    Raises:
        UsageError: fewer than three rays.
    """
    return (torch.tanh(sharpness * (1 - distance_ratios(rays, size))) + 1) / 2


def polygon_area(rays: Tensor) -> Tensor:
    """Return the area (...) of polygons (..., R) in pixels: sin(2 pi / R) / 2 * sum of r_i r_(i+1).

    Raises:
        UsageError: fewer than three rays.
    """
    return (rays * rays.roll(-1, -1)).sum(-1) * math.sin(_sector_width(rays)) / 2


def fit_to_pixels(rays: Tensor, size: tuple[int, int], *, pixels: int) -> Tensor:
    """Scale a shape to the largest size that covers at most `pixels` pixels of the window.

    A pixel is in the shape scaled by t if and only if its u is at most t, so the scale follows from the sorted u: no
    search, and the budget holds on the exact mask and not only on the area. Fewer pixels are covered where the next
    ones would come several at once.

    Args:
        rays: (..., R), positive.
        size: (h, w) of the window, odd, so that one pixel is in the middle.
        pixels: the budget, less than the window has.

    Returns:
        (..., R).

    Raises:
        UsageError: fewer than three rays.
    """
    ratios = distance_ratios(rays, size).flatten(-2).sort(-1).values
    beyond = ratios[..., pixels, None]
    # Half way between the last pixel and the next one: rounding errors of the scaled rays then change nothing.
    last = ratios.masked_fill(ratios > beyond * (1 - _SAME), 0).amax(-1, keepdim=True)
    return rays * (last + beyond) / 2


def distance_ratios(rays: Tensor, size: tuple[int, int]) -> Tensor:
    """Return u (..., h, w): the distance of each pixel from the middle, over the boundary's in that direction.

    Raises:
        UsageError: fewer than three rays.
    """
    width = _sector_width(rays)
    rows, columns = (torch.arange(side, device=rays.device, dtype=rays.dtype) - (side - 1) / 2 for side in size)
    rows, columns = rows[:, None], columns[None, :]
    angles = torch.atan2(rows, columns).remainder(2 * math.pi)
    # By a quotient of floats and not by whole degrees, or only divisors of 360 would give the right sector. Rounding
    # may put an angle just below the full turn behind the last sector.
    sectors = (angles / width).floor().long().clamp(max=rays.shape[-1] - 1)
    behind = angles - sectors * width
    near, far = rays[..., sectors], rays.roll(-1, -1)[..., sectors]
    inverse_boundary = ((width - behind).sin() / near + behind.sin() / far) / math.sin(width)
    return torch.hypot(rows, columns) * inverse_boundary


def _sector_width(rays: Tensor) -> float:
    """Return the angle between two rays, in radians."""
    if rays.shape[-1] < _FEWEST_RAYS:
        raise UsageError(f"{rays.shape[-1]} rays do not make a polygon: give at least {_FEWEST_RAYS}")
    return 2 * math.pi / rays.shape[-1]
