"""Double masking against its definition, spelled out image by image, and against every patch there is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import TypeAlias

import pytest
import torch
from torch import Tensor

from qadtr_brevitas.evaluation.mask_fill import MaskFill
from qadtr_brevitas.evaluation.mask_groups import MaskGroups
from qadtr_brevitas.evaluation.masks import covering_masks
from qadtr_brevitas.evaluation.patch_cleanser import double_masking
from qadtr_brevitas.evaluation.tta import TtaKind, averaged

Model: TypeAlias = Callable[[Tensor], Tensor]

SIDE, PATCH, CLASSES = 5, 2, 3
COLOR = torch.full((1, 1, 1), 0.5)
FILL, INTERPOLATE = MaskFill(COLOR), MaskFill(COLOR, "interpolate")


def random_model(seed: int) -> Model:
    """A small network on binary images whose answers depend on all pixels, and on some more than on others."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(SIDE * SIDE, 12, generator=generator)
    last = torch.randn(12, CLASSES, generator=generator)
    bias = torch.tensor([2.0, 0.0, 0.0])
    return lambda images: ((images.flatten(1) - 0.5) @ first).relu() @ last + bias


def binary_images(count: int, seed: int = 0) -> Tensor:
    return torch.randint(2, (count, 1, SIDE, SIDE), generator=torch.Generator().manual_seed(seed)).float()


def classes(model: Model, image: Tensor, *masks: Tensor) -> int:
    covered = torch.stack(masks).any(dim=0)
    return int(model(torch.where(covered, COLOR, image)[None]).argmax())


def defended_by_definition(model: Model, image: Tensor, masks: Tensor) -> int:
    """Algorithm 1 of PatchCleanser, in the order in which it is written."""
    alone = [classes(model, image, mask) for mask in masks]
    counts = Counter(alone)
    majority = min(counts, key=lambda label: (-counts[label], label))
    for mask, label in zip(masks, alone, strict=True):
        if label != majority and all(classes(model, image, mask, second) == label for second in masks):
            return label
    return majority


def proved_by_definition(model: Model, image: Tensor, masks: Tensor) -> int:
    seen = {classes(model, image, one, two) for one, two in product(masks, masks)}
    return seen.pop() if len(seen) == 1 else -1


def patched(image: Tensor) -> Iterator[Tensor]:
    """The image under every binary patch at every place."""
    for row, column in product(range(SIDE - PATCH + 1), repeat=2):
        for content in product((0.0, 1.0), repeat=PATCH * PATCH):
            other = image.clone()
            other[:, row : row + PATCH, column : column + PATCH] = torch.tensor(content).view(PATCH, PATCH)
            yield other


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("per_side", [2, 3])
def test_both_outcomes_are_those_of_the_definition(seed: int, per_side: int) -> None:
    model, images = random_model(seed), binary_images(25, seed)
    masks = covering_masks((SIDE, SIDE), PATCH, per_side=per_side)
    found = double_masking(model, images, masks, fill=FILL)
    assert found.defended.tolist() == [defended_by_definition(model, image, masks) for image in images]
    assert found.proved.tolist() == [proved_by_definition(model, image, masks) for image in images]


def try_every_patch(models: Iterable[Model], masks: Tensor | MaskGroups, fill: MaskFill = FILL) -> None:
    """Check that no patch changes a proved prediction, and that some patch changes a few of the others."""
    proved = changed = 0
    for seed, model in enumerate(models):
        images = binary_images(12, seed)
        found = double_masking(model, images, masks, fill=fill)
        for image, before, label in zip(images, found.defended, found.proved, strict=True):
            if label < 0 and changed > 3:
                continue
            others = torch.stack(list(patched(image)))
            after = double_masking(model, others, masks, fill=fill, prove=False).defended
            if label >= 0:
                assert before == label
                assert (after == label).all()
                proved += 1
            else:
                changed += bool((after != before).any())
    # Neither half of the test is empty.
    assert proved > 1
    assert changed > 3


@pytest.mark.parametrize(
    ("fill", "tta"),
    [(FILL, "none"), (INTERPOLATE, "none"), (FILL, "flip"), (FILL, "shift"), (FILL, "flip-shift")],
    ids=["mean", "interpolate", "flip", "shift", "flip-shift"],
)
def test_no_patch_changes_what_is_proved_and_some_patch_changes_the_rest(fill: MaskFill, tta: TtaKind) -> None:
    models = (averaged(random_model(seed), tta) for seed in range(8))
    try_every_patch(models, covering_masks((SIDE, SIDE), PATCH, per_side=2), fill)


def test_portions_make_no_difference() -> None:
    model, images = random_model(1), binary_images(20)
    masks = covering_masks((SIDE, SIDE), PATCH, per_side=3)
    whole = double_masking(model, images, masks, fill=FILL, batch_size=10_000)
    for size in (1, 7):
        parts = double_masking(model, images, masks, fill=FILL, batch_size=size)
        assert parts.defended.equal(whole.defended)
        assert parts.proved.equal(whole.proved)


def test_passes_of_the_proof_are_counted_and_the_test_stops_at_the_first_failure() -> None:
    masks = covering_masks((SIDE, SIDE), PATCH, per_side=3)
    pairs = len(masks) * (len(masks) - 1) // 2
    shown = 0
    for seed in range(4):
        model, images = random_model(seed), binary_images(25, seed)
        asked: list[int] = []

        def counted(images: Tensor, model: Model = model, asked: list[int] = asked) -> Tensor:
            asked.append(len(images))
            return model(images)

        found = double_masking(counted, images, masks, fill=FILL, batch_size=10)
        assert found.passes is not None
        assert int(found.passes.sum()) == sum(asked)
        assert set(found.passes[found.proved >= 0].tolist()) <= {len(masks) + pairs}
        shown += int(found.passes.sum())
    # The naive test shows every image under all ordered pairs.
    assert shown < 4 * 25 * len(masks) ** 2 / 2


def test_without_a_proof_the_predictions_are_the_same_and_cost_less() -> None:
    model, images = random_model(1), binary_images(20)
    masks = covering_masks((SIDE, SIDE), PATCH, per_side=3)
    whole = double_masking(model, images, masks, fill=FILL)
    quick = double_masking(model, images, masks, fill=FILL, prove=False)
    assert quick.defended.equal(whole.defended)
    assert (quick.proved == -1).all()
    assert quick.passes is not None
    assert whole.passes is not None
    assert int(quick.passes.sum()) < int(whole.passes.sum())


def test_images_that_failed_are_not_looked_at_again() -> None:
    looked = 0

    def model(images: Tensor) -> Tensor:
        nonlocal looked
        looked += len(images)
        # Class 1 where pixels of two far corners are both covered, which single masks do not do.
        corners = (images[:, 0, 0, 0] == 0.5) & (images[:, 0, -1, -1] == 0.5)
        return torch.stack([1 - corners.float(), corners.float()], dim=1)

    masks = covering_masks((SIDE, SIDE), PATCH, per_side=2)
    found = double_masking(model, torch.ones(3, 1, SIDE, SIDE), masks, fill=FILL, batch_size=3)
    assert found.proved.tolist() == [-1, -1, -1]
    assert looked < 3 * (4 + 6)
