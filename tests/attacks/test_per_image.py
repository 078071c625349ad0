"""What every attack on single images promises, and what the patch attacks among them share."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from qadtr_brevitas.attacks.a_qapa import AQapa
from qadtr_brevitas.attacks.autoattack import AutoAttack
from qadtr_brevitas.attacks.descent import OptimizerSteps
from qadtr_brevitas.attacks.lavan import Lavan
from qadtr_brevitas.attacks.location_patch import LocationPatch
from qadtr_brevitas.attacks.patch_auto import PatchAuto
from qadtr_brevitas.attacks.per_image import PatchTask, search_patches
from qadtr_brevitas.attacks.pixel import Fgsm, MiFgsm, Pgd
from qadtr_brevitas.attacks.random_patch import RandomPatch
from qadtr_brevitas.attacks.results import AttackGoal
from qadtr_brevitas.attacks.sparse_rs import SparseRs
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.seeding import generator
from tests.attacks.support import accuracy, attacked, predictions, sample, spy, target_rate

PATCHES = {
    "lavan": Lavan(size=4, steps=30, target=None),
    "location-patch": LocationPatch(size=4, steps=30),
    "a-qapa": AQapa(sizes=(4,), shapes=("square",), steps=20, patch_bits=8, keep_best=True),
    "sparse-rs": SparseRs(size=4, queries=200),
    "patch-auto": PatchAuto(size=4, version="fast"),
    "random-patch": RandomPatch(size=4, draws=5),
}
SEARCHES = {name: attack for name, attack in PATCHES.items() if name != "random-patch"}
TARGETED = {
    "lavan": Lavan(size=5, steps=40, target=1),
    "location-patch": LocationPatch(size=5, steps=40, target=1),
    "a-qapa": AQapa(sizes=(5,), shapes=("square",), steps=40, keep_best=True, target=1),
    "sparse-rs": SparseRs(size=5, queries=400, target=1),
    "patch-auto": PatchAuto(size=5, version="fast", target=1),
}
PIXELS = {"fgsm": Fgsm(), "pgd": Pgd(), "mi-fgsm": MiFgsm(), "autoattack": AutoAttack(eps=0.2)}


def each(attacks):
    return pytest.mark.parametrize("attack", attacks.values(), ids=attacks.keys())


@pytest.mark.slow
@each(SEARCHES)
def test_a_patch_lowers_accuracy_far_below_that_of_noise(toy, attack):
    noise = accuracy(toy, attacked(toy, RandomPatch(size=4, draws=1)))
    assert noise > 0.95
    assert accuracy(toy, attacked(toy, attack)) < noise - 0.5


@pytest.mark.slow
@each(SEARCHES)
def test_it_beats_the_best_of_as_many_random_patches(toy, attack):
    # A gradient step costs as much as about three forward passes.
    draws = 200 if isinstance(attack, SparseRs) else 90
    assert accuracy(toy, attacked(toy, attack)) < accuracy(toy, attacked(toy, RandomPatch(size=4, draws=draws))) - 0.3


@pytest.mark.slow
@each(TARGETED)
def test_a_targeted_patch_raises_the_target(toy, attack):
    noise = target_rate(toy, attacked(toy, RandomPatch(size=5)), 1)
    assert target_rate(toy, attacked(toy, attack), 1) > noise + 0.5


@pytest.mark.slow
@each(PATCHES)
def test_only_pixels_under_the_patch_change(toy, attack):
    images, _ = sample(toy)
    changed = (attacked(toy, attack) != images).any(1)
    assert 8 < changed.sum((1, 2)).max() <= 16
    assert changed.any(2).sum(1).max() <= 4
    assert changed.any(1).sum(1).max() <= 4


@pytest.mark.slow
@each(PATCHES)
def test_images_are_on_the_8_bit_grid(toy, attack):
    images = attacked(toy, attack)
    assert images.min() >= 0
    assert images.max() <= 1
    torch.testing.assert_close(images * 255, (images * 255).round(), atol=1e-4, rtol=0)


@pytest.mark.slow
@each(PATCHES | PIXELS)
def test_the_same_generator_gives_the_same_images(toy, attack):
    assert torch.equal(attacked(toy, attack, count=20), attacked(toy, attack, count=20))


@pytest.mark.slow
@each(PATCHES | {"pgd": Pgd()})
def test_another_seed_gives_other_images(toy, attack):
    assert not torch.equal(attacked(toy, attack, count=20), attacked(toy, attack, count=20, seed=1))


@pytest.mark.slow
@each(PATCHES | PIXELS)
def test_no_image_depends_on_the_others_of_its_batch(toy, attack):
    if isinstance(attack, Lavan):
        # Its pictures are the other images.
        attack = replace(attack, init="uniform")
    given = {"pictures": sample(toy, 50)} if isinstance(attack, PatchAuto) else {}
    images, labels = sample(toy, 40)
    mixed, others = images.clone(), labels.clone()
    mixed[20:], others[20:] = images[20:].flip(0), labels[20:].flip(0)
    first = attack.run(toy.model, images, labels, generator=generator(0), **given)
    second = attack.run(toy.model, mixed, others, generator=generator(0), **given)
    if isinstance(attack, AutoAttack):
        # Its later attacks draw for the images that are left.
        assert torch.equal(predictions(toy, first[:20]), predictions(toy, second[:20]))
    else:
        torch.testing.assert_close(first[:20], second[:20])


@each(PATCHES | PIXELS)
def test_the_network_is_left_as_it_was(toy, attack):
    before = [parameter.clone() for parameter in toy.model.parameters()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    images = attacked(toy, attack, count=10)
    assert not images.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert not toy.model.training
    for parameter, old in zip(toy.model.parameters(), before, strict=True):
        assert parameter.grad is None
        assert torch.equal(parameter, old)


@each({name: attack for name, attack in PATCHES.items() if isinstance(attack, SparseRs | RandomPatch)})
def test_a_black_box_attack_uses_no_gradients(toy, attack):
    def sealed(images):
        assert not torch.is_grad_enabled()
        assert not images.requires_grad
        return toy.model(images)

    with torch.enable_grad():
        attacked(toy, attack, model=sealed)


@each({name: attack for name, attack in PATCHES.items() if name != "a-qapa"})
def test_a_patch_larger_than_the_images_is_refused(toy, attack):
    with pytest.raises(UsageError, match="20x20 patch is larger than the 16x16 image"):
        attacked(toy, type(attack)(size=20), count=4)


@each(TARGETED | {"fgsm": Fgsm(), "pgd": Pgd(), "mi-fgsm": MiFgsm()})
def test_a_target_out_of_range_is_refused(toy, attack):
    with pytest.raises(UsageError, match=r"7.*0 to 3"):
        attacked(toy, type(attack)(target=7), count=4)


@each(TARGETED)
def test_images_of_the_target_class_are_returned_too(toy, attack):
    images, labels = sample(toy, 60)
    assert (labels == 1).any()
    assert attacked(toy, attack, count=60).shape == images.shape


@pytest.mark.slow
@each({name: attack for name, attack in SEARCHES.items() if name != "patch-auto"})
def test_more_restarts_do_no_worse(toy, attack):
    many = type(attack)(**{**vars(attack), "restarts": 3})
    assert accuracy(toy, attacked(toy, many, count=30)) <= accuracy(toy, attacked(toy, attack, count=30))


class Brightness(nn.Module):
    """The brighter an image the less it is class 0; a curve with a peak makes a descent overshoot."""

    def __init__(self, best=None):
        super().__init__()
        self.best = best

    def forward(self, images):
        mean = images.mean((1, 2, 3))
        score = mean if self.best is None else -(mean - self.best).abs()
        return torch.stack([-score, score], 1)


def search(model, *, steps, lr, start=0.25):
    images, labels = torch.zeros(3, 3, 4, 4), torch.zeros(3, dtype=torch.long)
    mask, goal = torch.ones(4, 4, dtype=torch.bool), AttackGoal.of(None, labels, loss="margin")
    task = PatchTask(model=model, images=images, mask=mask, goal=goal)
    patches, corners = torch.full((3, 3, 4, 4), start), torch.zeros(3, 2, dtype=torch.long)
    rule = OptimizerSteps(steps=steps, step_rule="sign", lr=lr)
    return search_patches(task.assess, patches, corners, rule=rule, steps=steps)


def test_the_last_update_is_scored():
    """Storing the best before each update would return the start after one step."""
    seen = []
    best = search(spy(Brightness(), seen), steps=1, lr=0.25)
    assert len(seen) == 2
    assert torch.equal(best.images, seen[-1])
    assert best.images.mean() == pytest.approx(0.5, abs=0.01)


def test_the_best_result_is_kept_and_not_the_last():
    seen = []
    best = search(spy(Brightness(best=0.5), seen), steps=4, lr=0.2)
    # 0.25, 0.45, 0.65, 0.45, 0.65
    assert [images.mean().item() for images in seen] == pytest.approx([0.25, 0.45, 0.65, 0.45, 0.65], abs=0.01)
    assert best.images.mean() == pytest.approx(0.45, abs=0.01)


def test_without_steps_the_start_is_scored():
    assert search(Brightness(), steps=0, lr=0.1).images.mean() == pytest.approx(0.25, abs=0.01)


def test_equal_steps_move_equally():
    """A gradient that accumulated over steps would not be seen with sign steps, so follow the raw one."""
    seen = []
    images, labels = torch.zeros(1, 3, 4, 4), torch.zeros(1, dtype=torch.long)
    mask, corners = torch.ones(4, 4, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.long)
    model = spy(Brightness(), seen)
    task = PatchTask(model=model, images=images, mask=mask, goal=AttackGoal.of(None, labels, loss="margin"))
    rule = OptimizerSteps(steps=3, step_rule="sgd", lr=4.8)
    search_patches(task.assess, torch.full((1, 3, 4, 4), 0.2), corners, rule=rule, steps=3)
    # The margin falls by 2 per unit of brightness, each of the 48 values has a share in it.
    assert [images.mean().item() for images in seen] == pytest.approx([0.2, 0.4, 0.6, 0.8], abs=0.01)
