"""What masks show: against its definition pixel by pixel, and never what lies under them."""

from __future__ import annotations

import torch
from torch import Tensor

from qadtr_brevitas.evaluation.mask_fill import LEVELS, MaskFill

COLOR = torch.tensor([0.1, 0.7]).view(-1, 1, 1)
INTERPOLATE = MaskFill(COLOR, "interpolate")


def images_and_masks(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (5, 2, 7, 9) of 8 bit and masks (5, 1, 7, 9), some of which hide whole rows, columns and images."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(LEVELS + 1, (5, 2, 7, 9), generator=generator) / LEVELS
    covered = torch.rand(5, 1, 7, 9, generator=generator) < torch.tensor([0.0, 0.3, 0.6, 0.9, 1.0]).view(-1, 1, 1, 1)
    covered[2, 0, 3] = covered[2, 0, :, 4] = True
    return images, covered


def interpolated(image: Tensor, covered: Tensor, row: int, column: int, color: float) -> float:
    """The pixel of one channel by walking from it in four directions to the first visible pixel."""
    total = weights = 0.0
    for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        steps, r, c = 1, row + down, column + right
        while 0 <= r < image.shape[0] and 0 <= c < image.shape[1]:
            if not covered[r, c]:
                total, weights = total + float(image[r, c]) * LEVELS / steps, weights + 1 / steps
                break
            steps, r, c = steps + 1, r + down, c + right
    return total / weights / LEVELS if weights else color


def test_interpolation_is_that_of_the_definition() -> None:
    images, covered = images_and_masks()
    found = INTERPOLATE.cover(images, covered)
    for number, channel, row, column in torch.cartesian_prod(*map(torch.arange, images.shape)).tolist():
        value = float(found[number, channel, row, column])
        if not covered[number, 0, row, column]:
            assert value == float(images[number, channel, row, column])
            continue
        color = float(COLOR[channel])
        expected = interpolated(images[number, channel], covered[number, 0], row, column, color)
        # Half a level at most by rounding; the color is shown as it is.
        assert abs(value - expected) <= 0.5 / LEVELS + 1e-5
        assert value == color or abs(value * LEVELS - round(value * LEVELS)) < 1e-3


def test_what_lies_under_a_mask_is_not_seen() -> None:
    images, covered = images_and_masks()
    other = torch.where(covered, 1 - images, images)
    for fill in (MaskFill(COLOR), INTERPOLATE):
        assert torch.equal(fill.cover(images, covered), fill.cover(other, covered))


def test_gradients_reach_visible_pixels_only() -> None:
    images, covered = images_and_masks()
    images.requires_grad_()
    shown = INTERPOLATE.cover(images, covered)
    # Each covered pixel is a mean of visible ones: their weights add up to one.
    (gradient,) = torch.autograd.grad(shown.sum(), images)
    assert not gradient[covered.expand_as(gradient)].any()
    assert (gradient[~covered.expand_as(gradient)] >= 1 - 1e-6).all()
    visible = (~covered[:4]).expand(-1, 2, -1, -1).sum()
    assert gradient.sum() > visible


def test_smooth_pictures_are_continued() -> None:
    # A straight ramp is its own interpolation, where the mean color is far from it.
    ramp = torch.arange(20).expand(1, 2, 20, 20) * 10 / LEVELS
    covered = torch.zeros(1, 1, 20, 20, dtype=torch.bool)
    covered[..., 6:13, 5:12] = True
    assert torch.allclose(INTERPOLATE.cover(ramp, covered), ramp, atol=10 / LEVELS)
    assert (MaskFill(COLOR).cover(ramp, covered) - ramp).abs().max() > 0.3
