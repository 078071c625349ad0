import pytest
import torch
from pydantic import ValidationError

from qadtr_brevitas.attacks.location_patch import LocationPatch
from qadtr_brevitas.attacks.per_image import PatchTask
from qadtr_brevitas.attacks.relocation import AllowedCorners, Relocation
from qadtr_brevitas.attacks.results import AttackGoal
from qadtr_brevitas.config import Recipe
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.seeding import generator
from tests.attacks.support import accuracy, attacked, corners_of, spy

ROWS, COLUMNS = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")


def towards(slope):
    """A model that is less sure of class 0 the more light lies where the slope is high."""

    def model(images):
        light = (images * slope).sum((1, 2, 3)) / 100
        return torch.stack([-light, light], 1)

    return model


def run(model, *, count=8, seed=0, image=0.0, **fields):
    images, labels = torch.full((count, 3, 16, 16), image), torch.zeros(count, dtype=torch.long)
    return LocationPatch(**{"size": 4, "steps": 6, **fields}).run(model, images, labels, generator=generator(seed))


@pytest.mark.parametrize("location", ["random", "full"])
def test_the_texture_moves_with_the_mask(location):
    """A mask that moved over a texture anchored to the image would show other pixels at the new place."""
    seen = []
    # Steps too small to see, so that all that changes is the place.
    images = run(spy(towards(COLUMNS), seen), location=location, steps=40, step_size=1e-9, center=None)
    start, end = corners_of(seen[0]), corners_of(images)
    assert (start[:, 1] < 12).any()
    assert (end[:, 1] == 12).all()
    for first, last, (row, column), (new_row, new_column) in zip(seen[0], images, start, end, strict=True):
        texture = first[:, row : row + 4, column : column + 4]
        assert torch.equal(last[:, new_row : new_row + 4, new_column : new_column + 4], texture)
        assert (last != 0).any(0).sum() == 16


def test_moves_end_at_the_last_row_and_column():
    images = run(towards(ROWS + COLUMNS), location="full", steps=16, center=None)
    assert torch.equal(corners_of(images), torch.full((8, 2), 12))


def test_every_place_can_be_drawn_the_last_row_and_column_included():
    corners = corners_of(run(towards(COLUMNS), location="none", steps=0, count=3000, center=None))
    assert len(corners.unique(dim=0)) == 13 * 13


def test_patches_never_cover_the_middle():
    # 10 of 32 pixels in the paper, 5 of these 16; a model that draws patches to it.
    middle = -((ROWS - 7.5) ** 2 + (COLUMNS - 7.5) ** 2)
    seen = []
    run(spy(towards(middle), seen), location="full", steps=12, count=40)
    covered = (torch.cat(seen) != 0).any(1).any(0)
    assert not covered[5:10, 5:10].any()
    assert covered.sum() == 256 - 25


@pytest.mark.parametrize("fields", [{"keep_out": (0, 0, 16, 9)}, {"keep_out": (0, 0, 16, 9), "center": None}])
def test_keep_out_replaces_the_middle(fields):
    seen = []
    run(spy(towards(-COLUMNS), seen), location="full", steps=12, count=200, **fields)
    covered = (torch.cat(seen) != 0).any(1).any(0)
    assert not covered[:, :9].any()
    assert covered[:, 9:].all()


def test_a_patch_without_room_beside_the_middle_is_refused():
    with pytest.raises(UsageError, match="no room for a 8x8 patch outside the box"):
        run(towards(COLUMNS), size=8)


@pytest.mark.parametrize(("location", "passes"), [("none", 1), ("random", 2), ("full", 5)])
def test_the_number_of_forward_passes(location, passes):
    seen = []
    run(spy(towards(COLUMNS), seen), location=location, steps=5)
    assert len(seen) == 5 * passes + 1


@pytest.mark.parametrize("location", ["random", "full"])
def test_a_move_is_not_credited_with_what_the_texture_step_achieved(location):
    """On a black image light counts alike everywhere: no move lowers the loss, only texture steps do."""
    seen = []

    def everywhere(images):
        # Double: the sum of so few 8-bit values is exact, whatever their order.
        light = images.double().sum((1, 2, 3))
        return torch.stack([-light, light], 1)

    run(spy(everywhere, seen), location=location, steps=10)
    steps = seen[:: 2 if location == "random" else 5]
    for images in steps:
        assert torch.equal(corners_of(images), corners_of(seen[0]))


def test_a_fixed_place():
    assert corners_of(run(towards(COLUMNS), place=(2, 7), location="none")).unique(dim=0).tolist() == [[2, 7]]


@pytest.mark.slow
def test_location_optimization_helps(toy):
    """The paper's order: no moves, one random direction, all four."""
    fixed, moved = (
        accuracy(toy, attacked(toy, LocationPatch(size=3, steps=20, location=location), count=200))
        for location in ("none", "full")
    )
    assert moved < fixed - 0.03


@pytest.mark.slow
def test_every_loss(toy):
    for loss in ("logits", "cross-entropy", "margin"):
        assert accuracy(toy, attacked(toy, LocationPatch(size=4, steps=20, loss=loss))) < 0.5


def test_the_starts_of_restarts_differ():
    seen = []
    run(spy(towards(COLUMNS), seen), location="none", steps=0, restarts=3)
    assert len(seen) == 3
    assert len({tuple(corners_of(images).flatten().tolist()) for images in seen}) == 3


def test_it_can_be_a_training_attack():
    recipe = Recipe.model_validate({"train": {"attack": {"name": "location-patch", "steps": 25, "step_size": 0.1}}})
    assert recipe.train.attack == LocationPatch(steps=25, step_size=0.1)
    assert recipe.train.attack.share == 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"place": (3, 3)}, "with a fixed place give location=none"),
        ({"center": 1.0}, "less than 1"),
        ({"location": "both"}, "'none', 'random' or 'full'"),
        ({"stride": 0}, "greater than or equal to 1"),
        ({"share": 0}, "greater than 0"),
        ({"max_iterations": 5}, "max_iterations"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValidationError, match=message):
        LocationPatch(**fields)


def test_shifted_corners():
    allowed_corners = AllowedCorners.outside((4, 4, 2, 2), (10, 10), (3, 3))
    corners = torch.tensor([[0, 0], [0, 6], [7, 7], [2, 0], [6, 3]])
    offsets = torch.tensor([[-2, 1], [0, 5], [3, -1], [0, 2], [0, 1]])
    # Over the border: ends at it. Into the box: not made.
    assert allowed_corners.shifted(corners, offsets).tolist() == [[0, 1], [0, 7], [7, 6], [2, 0], [6, 4]]


def test_random_directions_are_all_four():
    seen = []
    task = PatchTask(
        model=spy(towards(COLUMNS), seen),
        images=torch.zeros(400, 3, 16, 16),
        mask=torch.ones(4, 4, dtype=torch.bool),
        goal=AttackGoal.of(None, torch.zeros(400, dtype=torch.long), loss="margin"),
    )
    patches, corners = torch.ones(400, 3, 4, 4), torch.full((400, 2), 6)
    relocate = Relocation(
        allowed_corners=AllowedCorners.outside(None, (16, 16), (4, 4)), rule="random", stride=2, generator=generator(0)
    )
    moved, result = relocate(task.assess, patches, corners, task.assess(patches, corners))
    tried = corners_of(seen[-1]) - 6
    assert {tuple(offset) for offset in tried.tolist()} == {(-2, 0), (2, 0), (0, -2), (0, 2)}
    # Only the moves to the right lower the loss.
    right = tried[:, 1] == 2
    assert torch.equal(moved[right], corners[right] + torch.tensor([0, 2]))
    assert torch.equal(moved[~right], corners[~right])
    assert torch.equal(corners_of(result.images), moved)
