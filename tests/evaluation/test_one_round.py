"""The certifier of one round against every patch there is, and why covering each place k times is not enough."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.evaluation.masks import covered_places, covering_masks
from qadtr_brevitas.evaluation.one_round import line_masks, one_round, place_kinds
from tests.evaluation.test_patch_cleanser import FILL, INTERPOLATE, PATCH, SIDE, binary_images, patched, random_model


@pytest.mark.parametrize("image_size", [(5, 5), (8, 8), (7, 12), (32, 32)])
@pytest.mark.parametrize("patch", [1, 2, 5, (1, 4), (3, 2)])
@pytest.mark.parametrize("per_side", [2, 3, 5, 7])
def test_any_two_places_lie_under_one_mask(
    image_size: tuple[int, int], patch: int | tuple[int, int], per_side: int
) -> None:
    masks = line_masks(image_size, patch, per_side=per_side)
    assert 1 <= len(masks) <= per_side**2 + per_side
    height, width = (patch, patch) if isinstance(patch, int) else patch
    places = product(range(image_size[0] - height + 1), range(image_size[1] - width + 1))
    covers = torch.stack([masks[:, r : r + height, c : c + width].flatten(1).all(dim=1) for r, c in places])
    assert torch.equal(covered_places(masks, patch).flatten(0, 1), covers)
    assert ((covers.float() @ covers.float().T) > 0).all()
    assert bool((place_kinds(masks, patch).sum(dim=1) >= 1).all())


def test_a_whole_plane_covers_every_place_by_a_window_on_each_of_its_lines() -> None:
    # 25 places along a side, in five strides of five.
    masks = line_masks((29, 29), 5, per_side=5)
    assert len(masks) == 30
    assert int(place_kinds(masks, 5).sum(dim=1).min()) == 6


@pytest.mark.parametrize("seed", range(4))
def test_no_patch_changes_what_is_proved_and_some_patch_changes_the_rest(seed: int) -> None:
    fill = FILL if seed % 2 else INTERPOLATE
    masks = line_masks((SIDE, SIDE), PATCH, per_side=2)
    model, images = random_model(seed), binary_images(16, seed)
    found = one_round(model, images, masks, PATCH, fill=fill)
    for image, before, label in zip(images, found.defended, found.proved, strict=True):
        after = one_round(model, torch.stack(list(patched(image))), masks, PATCH, fill=fill).defended
        if label >= 0:
            assert before == label
            assert (after == label).all()
    assert found.passes is not None
    assert set(found.passes.tolist()) == {len(masks)}


def test_both_outcomes_of_the_proof_occur() -> None:
    masks = line_masks((SIDE, SIDE), PATCH, per_side=2)
    proved = torch.cat(
        [one_round(random_model(seed), binary_images(16, seed), masks, PATCH, fill=FILL).proved for seed in range(4)]
    )
    assert 3 < int((proved >= 0).sum()) < 61


def test_the_prediction_is_the_class_that_all_masks_over_one_place_agree_on() -> None:
    masks = line_masks((SIDE, SIDE), PATCH, per_side=2)
    kinds = place_kinds(masks, PATCH)
    for votes in product(range(2), repeat=len(masks)):
        answers = iter(votes)

        def model(images: Tensor, answers: object = answers) -> Tensor:
            return torch.eye(2)[[next(answers) for _ in images]]  # pyright: ignore[reportArgumentType, reportCallIssue]

        found = one_round(model, torch.ones(1, 1, SIDE, SIDE), masks, PATCH, fill=FILL)
        given = torch.tensor(votes)
        agreed = {int(given[kind][0]) for kind in kinds if len(set(given[kind].tolist())) == 1}
        assert len(agreed) <= 1
        expected = agreed.pop() if agreed else int(given.sum() * 2 > len(votes))
        assert int(found.defended) == expected
        assert int(found.proved) == (votes[0] if len(set(votes)) == 1 else -1)


def test_covering_every_place_k_times_is_not_enough_and_is_refused() -> None:
    # Every mask twice: each place is covered k = 2 times, but the corners share no mask.
    masks = covering_masks((8, 8), 2, per_side=3).repeat(2, 1, 1)
    places = covered_places(masks, 2)
    assert int(places.sum(dim=2).min()) == 2
    with pytest.raises(UsageError, match=r"2x2 .* at \d,\d and one at \d,\d .*line_masks"):
        one_round(random_model(0), torch.ones(1, 3, 8, 8), masks, 2, fill=FILL)
    # The same votes then come from two images, so that any rule is wrong on one: all masks say 0, with a patch on one
    # place, and all masks say 1, with a patch on the other.
    kinds = places.flatten(0, 1).unique(dim=0)
    one, other = next((one, other) for one in kinds for other in kinds if not (one & other).any())
    votes = torch.where(one, 0, 1)
    assert (votes[one] == 0).all()
    assert (votes[other] == 1).all()


def test_more_than_half_of_the_masks_over_every_place_is_enough() -> None:
    # CertMask's condition with 2k > n: any two sets of more than half of the masks share one.
    whole, left, right = torch.ones(4, 4), torch.ones(4, 4), torch.ones(4, 4)
    left[:, 3], right[:, 0] = 0, 0
    masks = torch.stack([whole, left, right]).bool()
    assert int(covered_places(masks, 1).sum(dim=2).min()) == 2
    assert len(place_kinds(masks, 1))


@pytest.mark.parametrize("per_side", [1, 4, 6, 9])
def test_other_numbers_than_primes_are_refused(per_side: int) -> None:
    with pytest.raises(UsageError, match=rf"got {per_side}: choose from 2, 3, 5, 7"):
        line_masks((8, 8), 2, per_side=per_side)


def test_a_patch_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="9x9 pixels does not fit"):
        line_masks((8, 8), 9)
