import math

import numpy as np
import pytest
import torch
from PIL import Image

from qadtr_brevitas.attacks.shapes import bounding_box, shape_mask
from qadtr_brevitas.attacks.transforms import relight, rotate_patch, transform_patch, turning_reach
from qadtr_brevitas.core.seeding import generator


def example(height=6, width=9, *, dtype=torch.float32):
    draw = generator(0, "transforms")
    texture = torch.rand(3, height, width, generator=draw, dtype=dtype)
    mask = torch.rand(height, width, generator=draw) > 0.3
    mask[0, 0] = mask[-1, -1] = True
    return texture, mask


def transform(texture, mask, *, size, degrees=0.0, scale=1.0, shift=(0.0, 0.0)):
    """One image's patch."""
    one = texture.new_ones(1)
    textures, masks = transform_patch(
        texture, mask, size=size, degrees=one * degrees, scale=one * scale, shift=texture.new_tensor([shift])
    )
    return textures[0], masks[0]


def where_from(mask, size, *, degrees, scale, shift):
    """For each pixel of the window, the row and column of the patch that its center comes from, as fractions."""
    turn = math.radians(degrees)
    rows, columns = torch.meshgrid(*(torch.arange(side).double() - (side - 1) / 2 for side in size), indexing="ij")
    up, right = -(rows - shift[0]) / scale, (columns - shift[1]) / scale
    # Turned back by -degrees, with rows upward as in a drawing.
    column = right * math.cos(-turn) - up * math.sin(-turn)
    row = -(right * math.sin(-turn) + up * math.cos(-turn))
    return row + (mask.shape[0] - 1) / 2, column + (mask.shape[1] - 1) / 2


CASES = [
    {"degrees": 0.0, "scale": 1.0, "shift": (0.3, -0.2)},
    {"degrees": 22.5, "scale": 1.1, "shift": (0.0, 0.0)},
    {"degrees": -60.0, "scale": 0.7, "shift": (1.3, -2.1)},
    {"degrees": 170.0, "scale": 1.9, "shift": (-0.4, 3.0)},
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [(15, 15), (11, 14)])
def test_a_pixel_is_covered_if_its_center_comes_from_the_mask(case, size):
    texture, mask = example()
    row, column = where_from(mask, size, **case)
    _, got = transform(texture, mask, size=size, **case)
    near_row, near_column = row.round().long(), column.round().long()
    valid = (near_row >= 0) & (near_row < 6) & (near_column >= 0) & (near_column < 9)
    expected = valid & mask[near_row.clamp(0, 5), near_column.clamp(0, 8)]
    assert torch.equal(got, expected)


@pytest.mark.parametrize("case", CASES)
def test_colors_are_interpolated_between_pixels_of_the_mask_alone(case):
    size = (15, 13)
    texture, mask = example()
    textures, inside = transform(texture, mask, size=size, **case)
    row, column = where_from(mask, size, **case)
    total, weights = torch.zeros(3, *size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for i, j in mask.nonzero().tolist():
        weight = (1 - (row - i).abs()).clamp(min=0) * (1 - (column - j).abs()).clamp(min=0)
        total += weight * texture[:, i, j, None, None]
        weights += weight
    expected = (total / weights).float()
    torch.testing.assert_close(textures[:, inside], expected[:, inside], rtol=0, atol=1e-5)


def test_one_color_stays_one_color():
    texture, mask = torch.full((3, 8, 8), 0.3), shape_mask("disc", 8)
    textures, inside = transform(texture, mask, size=(13, 13), degrees=17.0, scale=1.1)
    torch.testing.assert_close(textures[:, inside], torch.full((3, int(inside.sum())), 0.3))


def test_each_image_is_transformed_its_own_way():
    texture, mask = example()
    draw = generator(1, "draws")
    degrees, scale = 90 * torch.randn(5, generator=draw), 0.5 + torch.rand(5, generator=draw)
    shift = torch.randn(5, 2, generator=draw)
    textures, masks = transform_patch(texture, mask, size=(12, 12), degrees=degrees, scale=scale, shift=shift)
    for number in range(5):
        alone = transform(
            texture,
            mask,
            size=(12, 12),
            degrees=degrees[number].item(),
            scale=scale[number].item(),
            shift=tuple(shift[number].tolist()),
        )
        torch.testing.assert_close(textures[number], alone[0])
        assert torch.equal(masks[number], alone[1])


def test_gradient_in_the_texture_against_finite_differences():
    texture, mask = example(dtype=torch.float64)
    texture.requires_grad_()

    def colors(texture):
        drawn, inside = transform(texture, mask, size=(11, 12), degrees=20.0, scale=0.9, shift=(0.5, 0.2))
        return relight(drawn[None], contrast=drawn.new_tensor([0.8]), brightness=drawn.new_tensor([0.05])) * inside

    assert torch.autograd.gradcheck(colors, texture)


@pytest.mark.parametrize("turns", [-3, -1, 0, 1, 2, 3, 4])
@pytest.mark.parametrize("size", [(8, 8), (7, 7), (6, 9)])
def test_quarter_turns_move_pixels_unchanged(turns, size):
    texture, mask = example(*size)
    rotated = rotate_patch(texture, mask, 90 * turns)
    turned, turned_mask = rotated.texture, rotated.mask
    expected_mask = torch.rot90(mask, turns, (0, 1))
    assert torch.equal(turned_mask, expected_mask)
    expected = torch.rot90(texture, turns, (1, 2))
    torch.testing.assert_close(turned[:, expected_mask], expected[:, expected_mask], rtol=0, atol=1e-5)


SMALL_TURNS = [0.01, -0.01, 89.99, 180.01, 270.01]


@pytest.mark.parametrize("degrees", SMALL_TURNS)
@pytest.mark.parametrize("size", [(8, 8), (7, 7), (6, 9), (8, 4)])
def test_a_hundredth_of_a_degree_changes_nothing_but_roundings(size, degrees):
    """A box of another parity than the patch's would blur it: its pixels would lie between those of the patch."""
    texture, mask = example(*size)
    near, exact = rotate_patch(texture, mask, degrees), rotate_patch(texture, mask, round(degrees))
    assert near.offset == exact.offset
    assert torch.equal(near.mask, exact.mask)
    torch.testing.assert_close(near.texture[:, near.mask], exact.texture[:, near.mask], rtol=0, atol=2e-3)


@pytest.mark.parametrize("degrees", [3, 5, 10, 22.5, -30, 45, 100, 200])
@pytest.mark.parametrize("size", [(8, 8), (7, 7), (5, 9), (8, 4)])
def test_rotation_about_the_middle_is_that_of_pillow(size, degrees):
    texture, mask = example(*size, dtype=torch.float64)
    rotated = rotate_patch(texture, mask, degrees)
    sheets = torch.cat([texture * mask, mask[None].double()])
    canvas = torch.nn.functional.pad(sheets, (8, 8, 8, 8))
    turned = [Image.fromarray(sheet.float().numpy()).rotate(degrees, Image.Resampling.BILINEAR) for sheet in canvas]
    expected = torch.stack([torch.from_numpy(np.array(sheet)) for sheet in turned])
    top, left = rotated.offset
    height, width = rotated.mask.shape
    window = expected[:, 8 + top : 8 + top + height, 8 + left : 8 + left + width]
    weights = window[3]
    colors = (window[:3] / weights.clamp(min=1e-6))[:, rotated.mask]
    torch.testing.assert_close(rotated.texture.float()[:, rotated.mask], colors, rtol=0, atol=1e-3)
    beside = expected[3].clone()
    beside[8 + top : 8 + top + height, 8 + left : 8 + left + width][rotated.mask] = 0
    assert beside.max() <= weights[rotated.mask].min() + 1e-5


@pytest.mark.parametrize("degrees", [0.01, 5, 22.5, 30, 45, -30, 60, 89, 100])
@pytest.mark.parametrize(
    "mask", [shape_mask("square", 8), shape_mask("disc", 12), shape_mask("rectangle", (1, 7)), example()[1]]
)
def test_a_turned_patch_keeps_its_number_of_pixels_and_has_no_empty_border(mask, degrees):
    rotated = rotate_patch(torch.rand(3, *mask.shape, generator=generator(0)), mask, degrees)
    assert rotated.mask.sum() == mask.sum()
    assert bounding_box(rotated.mask) == (0, 0, *rotated.mask.shape)


@pytest.mark.parametrize("degrees", [5, 22.5, 45, -30, 100])
@pytest.mark.parametrize("shape", [("square", 12), ("disc", 12), ("rectangle", (4, 9)), ("rectangle", (6, 2))])
def test_a_turned_patch_keeps_its_symmetry(shape, degrees):
    mask = shape_mask(*shape)
    turned = rotate_patch(torch.rand(3, *mask.shape, generator=generator(0)), mask, degrees).mask
    assert torch.equal(turned, turned.flip((0, 1)))


@pytest.mark.parametrize("degrees", [1, 4, 10, 90, 180])
def test_a_patch_that_is_lighter_on_one_side_keeps_its_middle(degrees):
    """The box around a mask without symmetry is cut on one side only."""
    mask = torch.zeros(9, 9, dtype=torch.bool)
    mask[0, 4] = mask[2:6, 3:7] = True
    rotated = rotate_patch(torch.ones(3, 9, 9), mask, degrees)
    before, after = (part.nonzero().double().mean(0) for part in (mask, rotated.mask))
    turn = math.radians(degrees)
    row, column = (before - 4).tolist()
    expected = torch.tensor(
        [row * math.cos(turn) - column * math.sin(turn), column * math.cos(turn) + row * math.sin(turn)]
    )
    # A mean over whole pixels.
    torch.testing.assert_close((after + torch.tensor(rotated.offset) - 4).float(), expected, rtol=0, atol=0.25)


def test_contrast_and_brightness():
    textures = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(2, 3, 1, 1)
    lit = relight(textures, contrast=torch.tensor([2.0, 0.5]), brightness=torch.tensor([-0.5, 0.1]))
    torch.testing.assert_close(lit[..., 0, 0], torch.tensor([[0.0, 0.5, 1.0], [0.1, 0.35, 0.6]]))


@pytest.mark.parametrize("degrees", [0.0, 10.0, 30.0, 45.0, 90.0, 180.0])
@pytest.mark.parametrize("mask", [shape_mask("square", 8), shape_mask("disc", 8), example()[1]])
def test_the_reach_of_a_patch_that_turns(mask, degrees):
    rows, columns = turning_reach(mask, degrees)
    covered = mask.nonzero().double() - torch.tensor([(side - 1) / 2 for side in mask.shape])
    offsets = torch.tensor([(-0.5, -0.5), (-0.5, 0.5), (0.5, -0.5), (0.5, 0.5)], dtype=torch.float64)
    y, x = (covered[:, None] + offsets).flatten(0, 1).unbind(1)
    turns = torch.linspace(-degrees, degrees, 721, dtype=torch.float64).deg2rad()[:, None]
    assert rows == pytest.approx((y * turns.cos() - x * turns.sin()).abs().max().item(), rel=1e-4)
    assert columns == pytest.approx((x * turns.cos() + y * turns.sin()).abs().max().item(), rel=1e-4)
