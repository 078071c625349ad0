import pytest
import torch

from qadtr_brevitas.attacks.shapes import bounding_box, shape_mask, side_for_area
from qadtr_brevitas.core.errors import UsageError


@pytest.mark.parametrize("side", [1, 2, 3, 6, 7, 8, 10, 50])
def test_a_disc_covers_the_pixels_whose_center_is_in_the_circle(side):
    middle = (side - 1) / 2
    expected = [
        [(row - middle) ** 2 + (column - middle) ** 2 <= (side / 2) ** 2 for column in range(side)]
        for row in range(side)
    ]
    assert shape_mask("disc", side).tolist() == expected


def test_exact_areas():
    assert shape_mask("square", 8).sum() == 64
    assert shape_mask("rectangle", (4, 9)).sum() == 36
    assert shape_mask("rectangle", (4, 9)).shape == (4, 9)
    assert [int(shape_mask("disc", side).sum()) for side in (4, 6, 8)] == [12, 32, 52]


@pytest.mark.parametrize(("shape", "size"), [("rectangle", 4), ("square", (4, 4)), ("disc", (4, 4))])
def test_a_size_must_go_with_its_shape(shape, size):
    with pytest.raises(UsageError, match=f"does not fit shape {shape}: give a"):
        shape_mask(shape, size)


def test_a_size_must_be_positive():
    with pytest.raises(UsageError, match="give at least 1 pixel"):
        shape_mask("square", 0)


@pytest.mark.parametrize(("share", "side"), [(0.06, 54), (0.08, 63), (0.1, 70), (1.0, 224)])
def test_area_is_a_share_of_the_pixels(share, side):
    assert side_for_area(share, (224, 224)) == side


def test_area_on_small_images():
    assert side_for_area(1 / 16, (32, 32)) == 8


@pytest.mark.parametrize("share", [0.01, 0.0351563, 0.0625, 0.2])
def test_a_disc_never_exceeds_its_budget_and_uses_it(share):
    side = side_for_area(share, (32, 32), "disc")
    assert shape_mask("disc", side).sum() <= share * 1024 < shape_mask("disc", side + 1).sum()


def test_areas_that_cannot_be_used():
    with pytest.raises(UsageError, match="less than one pixel"):
        side_for_area(0.0001, (32, 32))
    with pytest.raises(UsageError, match="does not determine a rectangle"):
        side_for_area(0.1, (32, 32), "rectangle")


def test_the_smallest_box_around_a_mask():
    mask = torch.zeros(7, 9, dtype=torch.bool)
    mask[2, 5] = mask[4, 3] = True
    assert bounding_box(mask) == (2, 3, 3, 3)
    assert bounding_box(shape_mask("disc", 6)) == (0, 0, 6, 6)
