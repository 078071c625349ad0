import math

import pytest
import torch

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
    turned, turned_mask = rotate_patch(texture, mask, 90 * turns)
    expected_mask = torch.rot90(mask, turns, (0, 1))
    assert torch.equal(turned_mask, expected_mask)
    expected = torch.rot90(texture, turns, (1, 2))
    torch.testing.assert_close(turned[:, expected_mask], expected[:, expected_mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize("degrees", [5, 22.5, 45, -30, 100])
@pytest.mark.parametrize("shape", ["square", "disc"])
def test_a_turned_patch_keeps_its_area_and_has_no_empty_border(degrees, shape):
    mask = shape_mask(shape, 12)
    _, turned = rotate_patch(torch.rand(3, 12, 12, generator=generator(0)), mask, degrees)
    assert turned.sum().item() == pytest.approx(mask.sum().item(), rel=0.06)
    assert bounding_box(turned) == (0, 0, *turned.shape)
    # A square's half turn and a disc's any turn.
    assert torch.equal(turned, turned.flip((0, 1)))


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
