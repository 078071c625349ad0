"""The ensemble of patch searches: never weaker than its parts, and the same whatever the batch."""

from __future__ import annotations

import pytest
import torch

from qadtr_brevitas.attacks.image_streams import ImageStreams
from qadtr_brevitas.attacks.location_patch import LocationPatch
from qadtr_brevitas.attacks.patch_auto import VERSIONS, Ensemble, GradientPart, PatchAuto, RandomPart
from qadtr_brevitas.attacks.per_image import PatchTask
from qadtr_brevitas.attacks.place_scan import best_corners, first_order_gains
from qadtr_brevitas.attacks.relocation import AllowedCorners
from qadtr_brevitas.attacks.results import AttackGoal
from qadtr_brevitas.core.seeding import generator
from tests.attacks.support import accuracy, attacked, corners_of, predictions, sample, spy

PARTS = (
    GradientPart(loss="margin", start="noise", place=0, steps=6),
    GradientPart(loss="dlr", start="picture", place=1, steps=6),
    GradientPart(loss="cross-entropy", start="noise", place=None, steps=6),
    RandomPart(queries=30),
)


def ensemble(toy, *, count=60, side=3, parts=PARTS, pictures=None, target=None, model=None, first=0):
    images, labels = (values[first:] for values in sample(toy, first + count))
    goal = AttackGoal.of(target, labels, loss="margin")
    mask = torch.ones(side, side, dtype=torch.bool)
    return Ensemble(
        parts=parts,
        task=PatchTask(model=model or toy.model, images=images, mask=mask, goal=goal),
        places=AllowedCorners.outside(None, (16, 16), (side, side)),
        moves=True,
        streams=ImageStreams.of(5, range(first, first + count)),
        pictures=pictures or sample(toy, 100),
    )


def broken(toy, images, first=0):
    with torch.no_grad():
        return toy.model(images).argmax(1) != toy.test[1][first : first + len(images)]


@pytest.mark.slow
def test_it_breaks_every_image_that_one_of_its_parts_breaks(toy):
    together = ensemble(toy)
    found = broken(toy, together.run().images)
    gains, clean = first_order_gains(together.task)
    for number, part in enumerate(PARTS):
        alone = together.search(part, gains, number)
        assert alone.success.any()
        assert not (alone.success & ~found).any()
    assert (clean.success <= found).all()


@pytest.mark.slow
@pytest.mark.parametrize("target", [None, 2])
def test_no_image_depends_on_the_others_of_its_batch(toy, target):
    whole = ensemble(toy, count=24, target=target).run().images
    parts = [ensemble(toy, count=8, target=target, first=first).run().images for first in (0, 8, 16)]
    assert torch.equal(broken(toy, whole), broken(toy, torch.cat(parts)))
    torch.testing.assert_close(whole, torch.cat(parts), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_indices_and_not_places_in_the_batch_decide_the_draws(toy):
    images, labels = sample(toy, 12)
    attack = PatchAuto(size=3, version="fast")
    pictures = sample(toy, 50)
    both = attack.run(toy.model, images, labels, generator=generator(1), indices=range(12), pictures=pictures)
    last = attack.run(
        toy.model, images[8:], labels[8:], generator=generator(1), indices=range(8, 12), pictures=pictures
    )
    torch.testing.assert_close(both[8:], last, rtol=0, atol=1e-6)
    other = attack.run(toy.model, images[8:], labels[8:], generator=generator(1), indices=range(4), pictures=pictures)
    assert not torch.equal(other, last)


@pytest.mark.parametrize("version", ["fast", pytest.param("standard", marks=pytest.mark.slow)])
@pytest.mark.parametrize("place", ["random", (2, 5)])
def test_passes_are_not_exceeded(toy, version, place):
    """A network that no patch deceives costs all of them."""
    forward = backward = 0

    def stubborn(images):
        nonlocal forward, backward
        forward += len(images)
        backward += len(images) * images.requires_grad
        light = images.mean((1, 2, 3))
        return torch.stack([10 - light, light, -light, light / 2], 1)

    attack = PatchAuto(size=2, version=version, place=place)
    images = torch.zeros(3, 3, 8, 8)
    attack.run(stubborn, images, torch.zeros(3, dtype=torch.long), generator=generator(0))
    assert attack.passes.backward == backward / 3
    assert 0.98 * attack.passes.forward <= forward / 3 <= attack.passes.forward


def test_broken_images_go_on_to_no_other_part(toy):
    seen = []
    ensemble(toy, side=6, model=spy(toy.model, seen)).run()
    assert len(seen[-2]) < 10
    wrong = sample(toy, 30)[0], (sample(toy, 30)[1] + 1) % 4
    seen.clear()
    attack = PatchAuto(size=3, version="fast")
    unchanged = attack.run(spy(toy.model, seen), *wrong, generator=generator(0))
    clean = predictions(toy, wrong[0]) != wrong[1]
    assert torch.equal(unchanged[clean], wrong[0][clean])


@pytest.mark.slow
def test_it_is_stronger_than_a_search_of_as_many_passes(toy):
    auto = accuracy(toy, attacked(toy, PatchAuto(size=3, version="fast"), count=200))
    plain = accuracy(toy, attacked(toy, LocationPatch(size=3, steps=100, center=None), count=200))
    assert auto < plain


@pytest.mark.slow
def test_standard_is_no_weaker_than_fast(toy):
    fast, standard = (
        accuracy(toy, attacked(toy, PatchAuto(size=2, version=version), count=12)) for version in ("fast", "standard")
    )
    assert standard <= fast


def test_a_network_blind_to_noise_is_broken_from_pictures(toy):
    """The network sees a patch only if neighbors are alike; from noise there is no gradient."""

    def blind(images):
        rough = (images[..., 1:] - images[..., :-1]).abs().amax((1, 2, 3)) > 0.75
        return torch.where(rough[:, None], toy.model(images.round()).detach() * 0, toy.model(images))

    parts = tuple(part for part in PARTS if isinstance(part, GradientPart) and part.start == "picture")
    assert ensemble(toy, side=5, parts=parts, model=blind).run().success.float().mean() > 0.3


def test_first_order_gains_are_those_of_a_linear_network():
    draw = generator(0, "linear")
    slope = torch.randn(3, 8, 8, generator=draw)
    images = torch.rand(2, 3, 8, 8, generator=draw)
    mask = torch.tensor([[True, True, False], [True, True, True]])

    def linear(images):
        score = (images * slope).sum((1, 2, 3))
        return torch.stack([score, torch.zeros(len(images))], 1)

    goal = AttackGoal.of(None, torch.zeros(2, dtype=torch.long), loss="margin")
    task = PatchTask(model=linear, images=images, mask=mask, goal=goal)
    gains, clean = first_order_gains(task)
    best = (slope < 0).float().expand(2, -1, -1, -1)
    for row, column in ((0, 0), (3, 5), (6, 5)):
        corners = torch.tensor([[row, column]]).expand(2, 2)
        patch = best[:, :, row : row + 2, column : column + 3]
        fall = clean.losses - task.assess(patch, corners).losses
        torch.testing.assert_close(gains[:, row, column], fall, rtol=1e-4, atol=1e-4)


def test_best_places_are_apart_and_allowed():
    gains = torch.rand(4, 10, 12, generator=generator(0))
    allowed = AllowedCorners.outside((0, 0, 4, 14), (12, 14), (3, 3))
    first, second, third = best_corners(gains, 3, allowed=allowed, apart=(2, 2))
    assert (first[:, 0] >= 4).all()
    inside = gains[:, 4:]
    assert torch.equal(gains[torch.arange(4), first[:, 0], first[:, 1]], inside.flatten(1).amax(1))
    assert ((first - second).abs().amax(1) >= 2).all()
    assert ((third - second).abs().amax(1) >= 2).all()


@pytest.mark.slow
def test_a_fixed_place_is_kept_and_a_box_left_free(toy):
    images, labels = torch.zeros(5, 3, 16, 16), torch.full((5,), 3)

    def light(images):
        level = images.mean((1, 2, 3))
        return torch.stack([level, level - 1, level - 2, 5 - level], 1)

    fixed = PatchAuto(size=3, version="fast", place=(4, 9)).run(light, images, labels, generator=generator(0))
    assert corners_of(fixed).unique(dim=0).tolist() == [[4, 9]]
    free = PatchAuto(size=3, version="fast", keep_out=(0, 0, 16, 8)).run(light, images, labels, generator=generator(0))
    assert free[..., :8].sum() == 0
    assert free[..., 8:].sum() > 0


def test_versions_have_every_loss_start_and_random_search():
    for parts in VERSIONS.values():
        searches = [part for part in parts if isinstance(part, GradientPart)]
        assert {part.loss for part in searches} == {"margin", "dlr", "cross-entropy"}
        assert {part.start for part in searches} == {"noise", "picture"}
        assert isinstance(parts[-1], RandomPart)
