import pytest
import torch

from qadtr_brevitas.attacks.geometry import (
    blend,
    crop,
    fixed_corners,
    paste,
    place_corners,
    random_corners,
    windows_about,
)
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.seeding import generator


def reference(images, texture, mask, corners):
    """x * (1 - M) + p * M with full-size canvases, one image at a time."""
    size = texture.shape[-2:]
    pasted = []
    for number, (row, column) in enumerate(corners.tolist()):
        own = texture if texture.ndim == 3 else texture[number]
        own_mask = mask if mask.ndim == 2 else mask[number]
        room = (column, images.shape[3] - column - size[1], row, images.shape[2] - row - size[0])
        canvas = torch.nn.functional.pad(own, room)
        covered = torch.nn.functional.pad(own_mask.to(images.dtype), room)
        pasted.append(images[number] * (1 - covered) + canvas * covered)
    return torch.stack(pasted)


def example(*, per_image, dtype=torch.float32):
    draw = generator(0, "geometry")
    images = torch.rand(5, 3, 9, 12, generator=draw, dtype=dtype)
    lead = (5,) if per_image else ()
    texture = torch.rand(*lead, 3, 4, 3, generator=draw, dtype=dtype)
    mask = torch.rand(*lead, 4, 3, generator=draw) > 0.4
    corners = random_corners(5, (9, 12), (4, 3), generator=draw)
    return images, texture, mask, corners


@pytest.mark.parametrize("per_image", [False, True])
def test_paste_changes_masked_pixels_only(per_image):
    images, texture, mask, corners = example(per_image=per_image)
    before = images.clone()
    pasted = paste(images, texture, mask, corners)
    torch.testing.assert_close(pasted, reference(images, texture, mask, corners))
    covered = reference(torch.zeros_like(images), torch.ones_like(texture), mask, corners).bool()
    assert torch.equal(pasted[~covered], images[~covered])
    assert torch.equal(images, before)
    windows = crop(pasted, (4, 3), corners)
    inside = mask.expand(5, 4, 3)[:, None].expand_as(windows)
    assert torch.equal(windows[inside], texture.expand_as(windows)[inside])


@pytest.mark.slow
@pytest.mark.parametrize("per_image", [False, True])
def test_gradient_of_paste(per_image):
    images, texture, mask, corners = example(per_image=per_image, dtype=torch.float64)
    images.requires_grad_()
    texture.requires_grad_()
    weight = torch.rand(images.shape, generator=generator(1, "weight"), dtype=torch.float64)
    ours = torch.autograd.grad((paste(images, texture, mask, corners) * weight).sum(), (images, texture))
    theirs = torch.autograd.grad((reference(images, texture, mask, corners) * weight).sum(), (images, texture))
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected)
    assert torch.autograd.gradcheck(lambda x, p: paste(x, p, mask, corners), (images, texture))


def test_blend_is_a_weighted_mean_that_is_cut_at_the_border():
    draw = generator(0, "blend")
    images = torch.rand(3, 3, 9, 12, generator=draw, dtype=torch.float64)
    texture = torch.rand(3, 5, 4, generator=draw, dtype=torch.float64)
    cover = torch.rand(5, 4, generator=draw, dtype=torch.float64) * (torch.rand(5, 4, generator=draw) > 0.3)
    corners = torch.tensor([[-2, -2], [3, 4], [6, 10]])
    blended = blend(images, texture, cover, corners)
    for number, (row, column) in enumerate(corners.tolist()):
        expected = images[number].clone()
        for i, j in torch.cartesian_prod(torch.arange(5), torch.arange(4)).tolist():
            y, x = row + i, column + j
            if 0 <= y < 9 and 0 <= x < 12:
                expected[:, y, x] = (1 - cover[i, j]) * images[number, :, y, x] + cover[i, j] * texture[:, i, j]
        torch.testing.assert_close(blended[number], expected)
    untouched = blend(images, texture, torch.zeros_like(cover), corners)
    assert torch.equal(untouched, images)
    texture.requires_grad_()
    cover.requires_grad_()
    assert torch.autograd.gradcheck(lambda p, m: blend(images, p, m, corners), (texture, cover))


@pytest.mark.parametrize("corner", [(-3, 0), (0, -3), (7, 0), (0, 11)])
def test_blended_windows_stay_by_half_on_the_image(corner):
    with pytest.raises(UsageError, match="puts the patch outside the image"):
        blend(torch.zeros(1, 3, 9, 12), torch.zeros(3, 5, 4), torch.zeros(5, 4), torch.tensor([corner]))


def test_random_corners_reach_every_place_with_separate_draws():
    corners = random_corners(40_000, (10, 12), (4, 3), generator=generator(0, "corners"))
    counts = torch.zeros(7, 10).index_put_((corners[:, 0], corners[:, 1]), torch.ones(()), accumulate=True)
    expected = 40_000 / 70
    # 69 degrees of freedom: the 99.99 % quantile is 121.
    assert ((counts - expected) ** 2 / expected).sum() < 121
    rows, columns = corners.double().unbind(1)
    assert torch.corrcoef(torch.stack([rows, columns]))[0, 1].abs() < 0.02


def test_random_corners_reach_every_place_outside_the_box():
    box = (4, 3, 3, 5)
    corners = random_corners(5_000, (12, 12), (3, 2), generator=generator(0, "box"), keep_out=box)
    pasted = paste(torch.zeros(5_000, 1, 12, 12), torch.ones(1, 3, 2), torch.ones(3, 2, dtype=torch.bool), corners)
    assert pasted[:, :, 4:7, 3:8].sum() == 0
    assert len(corners.unique(dim=0)) == 10 * 11 - 5 * 6


def test_a_box_that_leaves_no_room_is_refused():
    with pytest.raises(UsageError, match="no room for a 3x3 patch outside the box"):
        random_corners(1, (8, 8), (3, 3), generator=generator(0), keep_out=(1, 1, 6, 6))


def test_the_same_seed_gives_the_same_corners():
    first, again, other = (
        random_corners(64, (32, 32), (8, 8), generator=generator(seed, "corners")) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_patch_as_large_as_the_image_has_one_place():
    assert random_corners(3, (8, 8), (8, 8), generator=generator(0)).tolist() == [[0, 0]] * 3


def test_fixed_corners():
    assert fixed_corners((2, 24), 3, (32, 32), (8, 8)).tolist() == [[2, 24]] * 3
    assert place_corners((2, 24), 3, (32, 32), (8, 8), generator=None).tolist() == [[2, 24]] * 3
    with pytest.raises(UsageError, match=r"does not fit at row 25, column 0 of a 32x32 image"):
        fixed_corners((25, 0), 3, (32, 32), (8, 8))


def test_windows_about_points():
    middles = torch.tensor([[16.0, 16.0], [15.3, 20.9], [0.0, 31.0], [2.0, 28.4]])
    corners, offsets = windows_about(middles, (32, 32), (7, 8))
    assert corners.tolist() == [[12, 12], [12, 17], [0, 24], [0, 24]]
    torch.testing.assert_close(corners + torch.tensor([3.5, 4.0]) + offsets, middles)
    assert windows_about(middles, (32, 32), (32, 32))[0].tolist() == [[0, 0]] * 4


def test_random_places_need_a_generator():
    with pytest.raises(UsageError, match="give a generator"):
        place_corners("random", 3, (32, 32), (8, 8), generator=None)


def test_a_patch_larger_than_the_image_is_refused():
    with pytest.raises(UsageError, match=r"a 40x8 patch is larger than the 32x32 image"):
        random_corners(1, (32, 32), (40, 8), generator=generator(0))
    with pytest.raises(UsageError, match=r"larger than the 8x8 image"):
        paste(torch.zeros(1, 3, 8, 8), torch.zeros(3, 9, 9), torch.ones(9, 9).bool(), torch.zeros(1, 2).long())


@pytest.mark.parametrize("corner", [(-1, 0), (0, -1), (25, 0), (0, 25)])
def test_corners_outside_the_image_do_not_wrap(corner):
    with pytest.raises(UsageError, match=r"rows 0\.\.24, columns 0\.\.24"):
        paste(torch.zeros(1, 3, 32, 32), torch.zeros(3, 8, 8), torch.ones(8, 8).bool(), torch.tensor([corner]))


def test_one_corner_per_image():
    with pytest.raises(UsageError, match=r"give one \(row, column\) each"):
        paste(torch.zeros(2, 3, 32, 32), torch.zeros(3, 8, 8), torch.ones(8, 8).bool(), torch.zeros(1, 2).long())
