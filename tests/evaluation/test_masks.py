"""Covering sets by brute force: wherever a patch of the size lies, one of the masks covers all of it."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.evaluation.mask_fill import MaskFill
from qadtr_brevitas.evaluation.masks import check_covers, covered_places, covering_masks, covering_set, mean_color
from qadtr_brevitas.evaluation.patch_cleanser import double_masking

FILL = MaskFill(torch.full((3, 1, 1), 0.5))


@pytest.mark.parametrize("image_size", [(5, 5), (8, 8), (6, 9), (32, 32)])
@pytest.mark.parametrize("patch", [(1, 1), (2, 2), (5, 5), (1, 4), (3, 2)])
@pytest.mark.parametrize("per_side", [1, 2, 3, 6])
def test_one_mask_covers_every_patch(image_size: tuple[int, int], patch: tuple[int, int], per_side: int) -> None:
    masks = covering_masks(image_size, patch, per_side=per_side)
    assert 1 <= len(masks) <= per_side**2
    height, width = patch
    for row, column in product(range(image_size[0] - height + 1), range(image_size[1] - width + 1)):
        assert bool(masks[:, row : row + height, column : column + width].flatten(1).all(dim=1).any())


def test_masks_of_images_that_are_not_square_and_their_size() -> None:
    masks = covering_masks((8, 32), 4, per_side=3)
    assert masks.shape[1:] == (8, 32)
    # Strides of ceil(5 / 3) = 2 and ceil(29 / 3) = 10 pixels: masks of 5 by 13.
    assert set(masks.flatten(1).sum(dim=1).tolist()) == {5 * 13}
    # Of strides of 5 pixels five reach the end of 32, so that fewer masks do than were allowed.
    assert len(covering_masks((32, 32), 8, per_side=6)) == 25
    assert len(covering_masks((224, 224), 32)) == 36


def test_every_pair_of_rows_and_columns_is_a_mask() -> None:
    found = covering_set((6, 9), "1x4", per_side=3)
    whole = {tuple(mask.flatten().tolist()) for mask in found.masks}
    pairs = {tuple((row[:, None] & column).flatten().tolist()) for row in found.rows for column in found.columns}
    assert whole == pairs


@pytest.mark.parametrize(("patch", "name"), [(9, "9x9"), ((9, 2), "9x2"), ((2, 33), "2x33")])
def test_a_patch_that_does_not_fit_is_refused(patch: int | tuple[int, int], name: str) -> None:
    with pytest.raises(UsageError, match=rf"{name} pixels does not fit .* 8x32.* 1 to 8"):
        covering_masks((8, 32), patch)


@pytest.mark.parametrize("patch", [(1, 1), (2, 2), (3, 1), (8, 8)])
def test_covered_places_are_those_found_pixel_by_pixel(patch: tuple[int, int]) -> None:
    height, width = patch
    masks = torch.rand(5, 8, 9, generator=torch.Generator().manual_seed(0)) < 0.8
    found = covered_places(masks, patch)
    assert found.shape == (9 - height, 10 - width, 5)
    for row, column in product(range(9 - height), range(10 - width)):
        assert found[row, column].equal(masks[:, row : row + height, column : column + width].flatten(1).all(dim=1))


def test_masks_that_do_not_cover_are_refused_with_the_open_place() -> None:
    masks = covering_masks((8, 8), 2, per_side=3)
    check_covers(masks, 2)
    check_covers(masks, (2, 1))
    # The masks are 4 pixels wide with a stride of 3: a patch of 5 fits into none of them.
    with pytest.raises(UsageError, match=r"5x5 pixels at 0,0 .*'5x5'"):
        check_covers(masks, 5)
    masks[:, 7, 7] = False
    with pytest.raises(UsageError, match=r"2x2 pixels at 6,6 "):
        double_masking(lambda images: images.mean(dim=(2, 3)), torch.ones(1, 3, 8, 8), masks, fill=FILL, patch=2)


def test_the_color_of_masks_is_the_mean() -> None:
    assert torch.equal(mean_color((0.1, 0.2, 0.3)).flatten(), torch.tensor([0.1, 0.2, 0.3]))
