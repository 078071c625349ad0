"""Overlapping masks: their geometry, their averages spelled out, and what they prove against every patch there is."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.evaluation.mask_groups import MaskGroups, covering_groups
from qadtr_brevitas.evaluation.masks import check_covers, covered_places, covering_masks
from qadtr_brevitas.evaluation.patch_cleanser import double_masking
from tests.evaluation.test_patch_cleanser import (
    COLOR,
    FILL,
    PATCH,
    SIDE,
    Model,
    binary_images,
    random_model,
    try_every_patch,
)

GROUPS = covering_groups((SIDE, SIDE), PATCH, per_side=2)


@pytest.mark.parametrize("overlap", [1, 2, 3])
@pytest.mark.parametrize(
    ("image_size", "patch", "per_side"),
    [((32, 32), 5, 6), ((32, 32), 2, 6), ((17, 32), (3, 10), 4), ((8, 8), 8, 2), ((9, 5), (1, 5), 3), ((6, 6), 1, 6)],
)
def test_one_group_covers_each_place_and_masks_are_no_larger(
    image_size: tuple[int, int], patch: int | tuple[int, int], per_side: int, overlap: int
) -> None:
    groups = covering_groups(image_size, patch, per_side=per_side, overlap=overlap)
    # The first statement is the theorem's premise, by each member itself and not by what the class says of cores.
    places = covered_places(groups.masks, patch)[:, :, groups.members].all(dim=3)
    assert (places.sum(dim=2) == 1).all()
    assert (covered_places(groups.cores, patch) == places).all()
    plain = covering_masks(image_size, patch, per_side=per_side)
    assert groups.masks.flatten(1).sum(dim=1).max() <= plain.flatten(1).sum(dim=1).max()
    assert len(groups.masks.unique(dim=0)) == len(groups.masks)
    if overlap == 1:
        assert groups.members.shape[1] == 1


def test_four_masks_of_nine_pixels_lie_over_each_place_of_a_5x5_patch() -> None:
    groups = covering_groups((32, 32), 5)
    assert (len(groups.masks), tuple(groups.members.shape)) == (144, (121, 4))
    assert int(groups.masks.flatten(1).sum(dim=1).max()) == 81
    # Strides of 2 and 3 in turn: a patch has two or three places along a side under the same two masks.
    assert set(groups.cores.flatten(1).sum(dim=1).tolist()) == {36, 42, 49}


def mean_logits(model: Model, image: Tensor, groups: MaskGroups, one: int, two: int) -> Tensor:
    """Under two groups, or under one that is given twice: over its masks, not over its pairs."""
    members = groups.members
    pairs = [(a, a) for a in members[one]] if one == two else list(product(members[one], members[two]))
    covered = torch.stack([groups.masks[a] | groups.masks[b] for a, b in pairs])
    return model(torch.where(covered[:, None], COLOR, image)).mean(dim=0)


@pytest.mark.parametrize("seed", range(3))
def test_both_outcomes_are_those_of_the_definition(seed: int) -> None:
    model, images = random_model(seed), binary_images(6, seed)
    found = double_masking(model, images, GROUPS, fill=FILL, patch=PATCH, batch_size=7)
    count = len(GROUPS.members)
    for image, defended, proved in zip(images, found.defended.tolist(), found.proved.tolist(), strict=True):
        seen = torch.stack(
            [mean_logits(model, image, GROUPS, one, two) for one, two in product(range(count), repeat=2)]
        ).argmax(dim=1)
        seen = seen.view(count, count)
        alone = seen.diagonal().tolist()
        majority = min(set(alone), key=lambda label: (-alone.count(label), label))
        stands = (label for label, row in zip(alone, seen, strict=True) if label != majority and (row == label).all())
        assert defended == next(stands, majority)
        assert proved == (majority if (seen == majority).all() else -1)


def test_no_patch_changes_what_is_proved_and_some_patch_changes_the_rest() -> None:
    try_every_patch(map(random_model, range(5)), GROUPS)


def test_a_proof_sees_each_pair_of_masks_of_different_groups_once() -> None:
    asked: list[int] = []

    def certain(images: Tensor) -> Tensor:
        asked.append(len(images))
        return torch.tensor([1.0, 0.0, 0.0]).expand(len(images), -1)

    found = double_masking(certain, binary_images(1), GROUPS, fill=FILL)
    assert found.proved.tolist() == [0]
    assert found.passes is not None
    members = [set(group) for group in GROUPS.members.tolist()]
    pairs = {frozenset((a, b)) for one, two in combinations(members, 2) for a, b in product(one, two) if a != b}
    assert found.passes.tolist() == [len(GROUPS.masks) + len(pairs)] == [sum(asked)]
    assert int(GROUPS.pairs.triu(1).sum()) == len(pairs)


def test_the_logits_are_differentiable_and_portions_make_no_difference() -> None:
    model, images = random_model(1), binary_images(4)
    whole = double_masking(model, images, GROUPS, fill=FILL, batch_size=10_000)
    parts = double_masking(model, images, GROUPS, fill=FILL, batch_size=1)
    assert (parts.defended.equal(whole.defended), parts.proved.equal(whole.proved)) == (True, True)
    images = images.requires_grad_()
    logits = double_masking(model, images, GROUPS, fill=FILL, prove=False).logits
    assert logits is not None
    (gradient,) = torch.autograd.grad(logits.sum(), images)
    assert gradient.abs().sum() > 0


def test_groups_that_do_not_cover_are_refused() -> None:
    open_ = MaskGroups(GROUPS.masks, GROUPS.members[1:])
    with pytest.raises(UsageError, match="no mask covers a patch of 2x2 pixels at 0,0"):
        double_masking(random_model(0), binary_images(1), open_, fill=FILL, patch=PATCH)
    # Where each place lies under some mask of a group, but under no group as a whole, nothing is proved.
    apart = MaskGroups(GROUPS.masks, torch.stack([GROUPS.members[:, 0], GROUPS.members[:, 0].flip(0)], dim=1))
    with pytest.raises(UsageError, match="no mask covers"):
        check_covers(apart.cores, PATCH)
    with pytest.raises(UsageError, match="does not fit"):
        covering_groups((8, 8), 9)
