import math

import pytest
import torch

from qadtr_brevitas.attacks.polygon import (
    distance_ratios,
    fit_to_pixels,
    polygon_area,
    polygon_mask,
    soft_polygon_mask,
)
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.seeding import generator

COUNTS = [3, 7, 16, 24, 36, 50]


def star(count, *, lead=(), radius=6.0, seed=0):
    """Rays of very different lengths, double precision."""
    drawn = torch.rand(*lead, count, generator=generator(seed, "star", count), dtype=torch.float64)
    return radius * (0.4 + 1.2 * drawn)


def corners_of(rays):
    turns = torch.arange(len(rays)).double() * 2 * math.pi / len(rays)
    return torch.stack([rays * turns.cos(), rays * turns.sin()], dim=1)


def crossings(rays, size):
    """Even-odd rule: pixels whose line to the right crosses the polygon's sides an odd number of times."""
    ends = corners_of(rays)
    rows, columns = torch.meshgrid(*(torch.arange(side) - (side - 1) / 2 for side in size), indexing="ij")
    inside = torch.zeros(size, dtype=torch.bool)
    for (x, y), (x2, y2) in zip(ends, ends.roll(-1, 0), strict=True):
        spans = (y > rows) != (y2 > rows)
        inside ^= spans & (columns < (x2 - x) * (rows - y) / (y2 - y) + x)
    return inside


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("size", [(21, 21), (18, 25)])
def test_every_pixel_is_in_its_own_sector_for_any_number_of_rays(count, size):
    """Sectors of whole degrees would leave pixels out or give them the wrong sides unless `count` divides 360."""
    for seed in range(5):
        rays = star(count, seed=seed)
        assert torch.equal(polygon_mask(rays, size), crossings(rays, size))


@pytest.mark.parametrize("count", COUNTS)
def test_the_boundary_passes_through_the_ends_of_the_rays(count):
    """At an end u is 1: the pixels along a ray have their distance over its length."""
    rays = star(count)
    assert torch.equal(distance_ratios(rays, (9, 9))[4, 4], torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(
        distance_ratios(rays, (9, 9))[4, 5:], torch.arange(1, 5, dtype=torch.float64) / rays[0], rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("count", COUNTS)
def test_area_in_closed_form(count):
    rays = star(count, lead=(4,))
    x, y = torch.stack([corners_of(one) for one in rays]).unbind(-1)
    shoelace = (x * y.roll(-1, 1) - y * x.roll(-1, 1)).sum(1) / 2
    torch.testing.assert_close(polygon_area(rays), shoelace)


@pytest.mark.parametrize("count", [7, 24, 50])
def test_the_number_of_pixels_is_near_the_area(count):
    rays = star(count, lead=(20,), radius=20.0)
    pixels = polygon_mask(rays, (71, 71)).sum((-1, -2))
    assert ((pixels / polygon_area(rays) - 1).abs() < 0.05).all()


@pytest.mark.parametrize("count", COUNTS)
def test_gradients_against_finite_differences(count):
    rays = star(count, lead=(2,)).requires_grad_()
    assert torch.autograd.gradcheck(lambda rays: soft_polygon_mask(rays, (13, 15), sharpness=5.0), rays)
    assert torch.autograd.gradcheck(polygon_area, rays)


def test_many_polygons_at_once():
    rays = star(7, lead=(2, 3))
    hard, soft = polygon_mask(rays, (11, 13)), soft_polygon_mask(rays, (11, 13), sharpness=20.0)
    assert hard.shape == soft.shape == (2, 3, 11, 13)
    assert torch.equal(hard[1, 2], polygon_mask(rays[1, 2], (11, 13)))
    assert torch.equal(soft[1, 2], soft_polygon_mask(rays[1, 2], (11, 13), sharpness=20.0))


@pytest.mark.parametrize("sharpness", [5.0, 20.0, 100.0])
def test_the_soft_mask_rounds_to_the_exact_one(sharpness):
    rays = star(36, lead=(5,))
    soft = soft_polygon_mask(rays, (21, 21), sharpness=sharpness)
    assert torch.equal(soft >= 0.5, polygon_mask(rays, (21, 21)))
    assert soft.min() >= 0
    assert soft.max() <= 1
    torch.testing.assert_close(soft[:, 10, 10], torch.ones(5, dtype=torch.float64), atol=1e-4, rtol=0)


def test_a_sharp_border_starves_the_rays_of_small_shapes():
    """Why the search starts blurred: at 6x6 pixels the paper's 100 moves under a third of the rays."""

    def moved(radius, sharpness):
        rays = torch.full((36,), radius, requires_grad=True)
        slopes = torch.autograd.functional.jacobian(
            lambda rays: soft_polygon_mask(rays, (15, 15), sharpness=sharpness).flatten(), rays
        )
        # The steepest a border can be, for a pixel right at it.
        return (slopes.abs().amax(0) > 0.01 * sharpness / 2 / radius).float().mean()

    assert moved(3.4, 100.0) < 0.35
    assert moved(3.4, 15.0) == 1
    assert moved(4.5, 20.0) == 1


@pytest.mark.parametrize("pixels", [1, 9, 36, 64, 100, 144])
@pytest.mark.parametrize("count", [7, 36])
def test_the_budget_is_used_up_and_never_exceeded(pixels, count):
    for seed in range(10):
        rays = star(count, seed=seed).float()
        fitted = fit_to_pixels(rays, (31, 31), pixels=pixels)
        assert polygon_mask(fitted, (31, 31)).sum() == pixels
        torch.testing.assert_close(fitted / fitted[0], rays / rays[0])


def test_pixels_that_come_at_once_are_left_out_together():
    fitted = fit_to_pixels(torch.full((360,), 2.0), (31, 31), pixels=64)
    assert polygon_mask(fitted, (31, 31)).sum() == 61


def test_many_polygons_are_fitted_at_once():
    rays = star(24, lead=(2, 3)).float()
    fitted = fit_to_pixels(rays, (31, 31), pixels=50)
    assert (polygon_mask(fitted, (31, 31)).sum((-1, -2)) == 50).all()
    torch.testing.assert_close(fitted[1, 0], fit_to_pixels(rays[1, 0], (31, 31), pixels=50))


@pytest.mark.parametrize("function", [polygon_area, lambda rays: polygon_mask(rays, (5, 5))])
def test_two_rays_are_refused(function):
    with pytest.raises(UsageError, match=r"2 rays.*at least 3"):
        function(torch.ones(2))
