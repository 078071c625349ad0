from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import cross_entropy

from qadtr_brevitas.attacks.a_qapa import AQapa
from qadtr_brevitas.attacks.fake_quantize import fake_quantize
from qadtr_brevitas.attacks.patch_pool import PatchedBatch, PoolRules, worst_pairs
from qadtr_brevitas.attacks.starts import shrunk
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.core.seeding import generator
from tests.attacks.support import predictions, sample

SIDE = 6


def turn(toy, memory, *, seed=0, count=160, bits=32, **fields):
    """One training step's patched images; the memory goes on."""
    images, labels = sample(toy, count)
    attack = AQapa(**{"universal": 1.0, "sizes": (SIDE,), "shapes": ("square",), **fields})
    draw, precision = generator(seed, "step"), Precision.parse(bits)
    patched = attack.run(toy.model, images, labels, generator=draw, precision=precision, memory=memory)
    return images, labels, patched


def wrong_share(toy, memory, **fields):
    """How many of the training images are misclassified under the patches as they are, mean over some steps."""
    shares = []
    for seed in range(100, 110):
        copied = {name: kept.clone() for name, kept in memory.items()}
        _, labels, patched = turn(toy, copied, seed=seed, steps=0, **fields)
        shares.append((predictions(toy, patched) != labels).float().mean().item())
    return sum(shares) / len(shares)


def test_patches_start_as_pictures_of_their_target_class(toy):
    memory = {}
    images, labels, _ = turn(toy, memory, steps=0)
    begun = memory["targets"] >= 0
    assert int(begun.sum()) == 160 // 16
    for texture, target in zip(memory["textures"][begun], memory["targets"][begun], strict=True):
        pictures = shrunk(images[labels == target], (SIDE, SIDE))
        assert (pictures - texture).abs().amax((1, 2, 3)).min() < 1e-6


@pytest.mark.slow
def test_many_steps_of_training_make_them_strong(toy):
    """Three gradient steps at a time, which by themselves do little."""
    young, old = {}, {}
    turn(toy, young)
    for seed in range(40):
        turn(toy, old, seed=seed)
    assert wrong_share(toy, old) > wrong_share(toy, young) + 0.2


@pytest.mark.slow
def test_only_patches_whose_turn_it_is_change(toy):
    memory = {}
    for seed in range(20):
        turn(toy, memory, seed=seed)
    before = memory["textures"].clone()
    turn(toy, memory, seed=20)
    changed = (memory["textures"] != before).flatten(1).any(1)
    assert int(changed.sum()) == 10
    assert memory["textures"].min() >= 0
    assert memory["textures"].max() <= 1


def test_patches_are_replaced_now_and_then(toy):
    memory = {}
    for seed in range(30):
        turn(toy, memory, seed=seed, steps=0)
    targets = memory["targets"].clone()
    for seed in range(30, 60):
        turn(toy, memory, seed=seed, steps=0)
    assert 0 < (memory["targets"] != targets).sum() < len(targets)


@pytest.mark.parametrize("bits", [32, 4])
def test_only_masked_pixels_change_apart_from_the_quantized_image(toy, bits):
    images, _, patched = turn(toy, {}, bits=bits, sizes=(4, SIDE), shapes=("disc",))
    changed = (patched != fake_quantize(images, bits)).any(1)
    assert changed.any(2).sum(1).max() <= SIDE
    assert changed.any(1).sum(1).max() <= SIDE
    assert changed.sum((1, 2)).max() <= 32
    assert len(patched.unique()) <= 16 or bits == 32


def test_many_images_share_a_patch_at_places_of_their_own(toy):
    images, _, patched = turn(toy, {}, steps=0)
    changed = (patched != images).any(1)
    rows, columns = changed.any(2).float().argmax(1), changed.any(1).float().argmax(1)
    squares = torch.stack(
        [
            image[:, row : row + SIDE, column : column + SIDE]
            for image, row, column in zip(patched, rows.tolist(), columns.tolist(), strict=True)
            if row + SIDE <= 16 and column + SIDE <= 16
        ]
    )
    # Where a pixel of a patch equals the image's, its corner is not seen; so some squares are no patch.
    assert 10 <= len(squares.flatten(1).unique(dim=0)) < 30
    assert len(torch.stack([rows, columns], 1).unique(dim=0)) > 40


def test_the_other_images_have_patches_of_their_own(toy):
    memory = {}
    images, _, patched = turn(toy, memory, universal=0.25)
    assert int((memory["targets"] >= 0).sum()) == 40 // 16
    changed = (patched != images).any(1)
    assert changed.flatten(1).any(1).all()
    inks = [set(image[:, where].flatten().tolist()) for image, where in zip(patched, changed, strict=True)]
    shared = [len(one & other) for one, other in zip(inks, inks[2:], strict=False)]
    # Two patches on 40 images, in turn; what begins at noise has a color in common with others by chance only.
    assert min(shared[:38]) > 20
    assert max(shared[40:]) < 10


def grown_pool(toy):
    """A pool of 20 patches after some steps."""
    memory = {}
    for seed in range(25):
        turn(toy, memory, seed=seed, steps=5, **{**MAT, "pool_size": 20})
    return memory


def own_images(toy, memory, *, seed=0, **fields):
    """Labels and images under patches of their own: all but the first, which has one of the pool."""
    copied = {name: kept.clone() for name, kept in memory.items()}
    _, labels, patched = turn(toy, copied, seed=seed, **{**MAT, "pool_size": 20, "universal": 1 / 160, **fields})
    return labels[1:], patched[1:]


def loss_of(toy, labels, patched):
    with torch.no_grad():
        return cross_entropy(toy.model(patched), labels).item()


@pytest.mark.slow
def test_own_patches_that_begin_with_the_pool_are_stronger(toy):
    """Both before their first step and after as many steps as patches that begin with noise take."""
    memory = grown_pool(toy)
    for steps in (0, 3):
        noise, pool = (loss_of(toy, *own_images(toy, memory, steps=steps, init=init)) for init in ("uniform", "pool"))
        assert pool > noise + 0.1, steps


@pytest.mark.slow
def test_own_patches_begin_with_the_worst_of_more_pairs(toy):
    memory = grown_pool(toy)
    one, ten = (loss_of(toy, *own_images(toy, memory, steps=0, init="pool", pool_worst_of=count)) for count in (1, 10))
    assert ten > one + 0.1


def test_own_patches_leave_the_pool_as_it_is(toy):
    memory = {}
    turn(toy, memory, steps=0, **MAT)
    before = memory["textures"].clone()
    known = memory["targets"] >= 0
    assert known.any()
    turn(toy, memory, seed=1, **{**MAT, "universal": 1 / 1000, "init": "pool"})
    assert torch.equal(memory["textures"][known], before[known])


def test_own_patches_that_begin_with_the_pool_need_one():
    with pytest.raises(ValidationError, match=r"init=pool.*universal"):
        AQapa(init="pool")


def test_the_same_steps_give_the_same_patches(toy):
    one, other = {}, {}
    for memory in (one, other):
        for seed in range(3):
            turn(toy, memory, seed=seed)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_universal_patches_need_a_memory(toy):
    images, labels = sample(toy, 4)
    with pytest.raises(UsageError, match=r"universal=0\.5.*training.*universal=0.*lavan"):
        AQapa(universal=0.5).run(toy.model, images, labels, generator=generator(0))


@pytest.mark.parametrize("fields", [{"keep_best": True}, {"targeted": True}, {"target": 1}])
def test_fields_that_exclude_universal_patches(fields):
    with pytest.raises(ValidationError, match=r"leave out target, targeted and keep_best"):
        AQapa(universal=0.5, **fields)


MAT = {
    "pool_size": 50,
    "pool_targets": "turns",
    "pool_step_sizes": "drawn",
    "pool_worst_of": 5,
    "pool_write_back": 0.25,
    "pool_renewed": 0.0,
}
RULES = PoolRules(side=SIDE, size=20, worst_of=1, renewed=0.0)


def bare_batch(toy, count=60):
    images, labels = sample(toy, count)
    mask = torch.ones(SIDE, SIDE, dtype=torch.bool)
    return PatchedBatch(images=images, background=images, mask=mask, bits=32, step_error=0.0), labels


def pair_losses(toy, batch, labels, textures, chosen, corners):
    with torch.no_grad():
        patched = batch.with_patches(shrunk(textures[chosen], (SIDE, SIDE)), corners)
        return cross_entropy(toy.model(patched), labels, reduction="none")


def test_the_worst_of_several_pairs_is_never_weaker_than_one_of_them(toy):
    batch, labels = bare_batch(toy)
    memory = {}
    turn(toy, memory, steps=3, pool_size=20, pool_worst_of=40, pool_renewed=0.0)
    assert (memory["targets"] >= 0).all()
    losses = []
    for worst_of in (1, 4, 12):
        rules = replace(RULES, worst_of=worst_of)
        chosen, corners = worst_pairs(batch, toy.model, labels, memory, rules, generator=generator(0))
        losses.append(pair_losses(toy, batch, labels, memory["textures"], chosen, corners))
    one, four, twelve = losses
    assert (four >= one).all()
    assert (twelve >= four).all()
    assert twelve.mean() > one.mean() + 0.1


def test_targets_are_the_classes_in_turn_and_steps_are_drawn_log_uniformly(toy):
    memory = {}
    for seed in range(4):
        turn(toy, memory, seed=seed, steps=0, **{**MAT, "pool_size": 600})
    begun = (memory["targets"] >= 0).nonzero()[:, 0]
    classes = toy.model(sample(toy, 1)[0]).shape[1]
    assert len(begun) > 300
    assert torch.equal(memory["targets"][begun], begun % classes)
    exponents = memory["steps"].log10()
    assert exponents.min() >= -4.001
    assert exponents.max() <= -0.999
    torch.testing.assert_close(
        exponents.quantile(torch.tensor([0.25, 0.5, 0.75])), torch.tensor([-3.25, -2.5, -1.75]), rtol=0, atol=0.2
    )


def test_a_quarter_of_the_change_is_written_back(toy):
    """What lies on the images is the improved patch; the pool moves a quarter of the way to it."""
    whole, quarter = {}, {}
    for memory in (whole, quarter):
        turn(toy, memory, steps=0, **MAT)
    before = whole["textures"].clone()
    assert torch.equal(before, quarter["textures"])
    patched = [
        turn(toy, memory, seed=1, steps=2, **{**MAT, "pool_write_back": weight})[2]
        for memory, weight in ((whole, 1.0), (quarter, 0.25))
    ]
    assert torch.equal(*patched)
    moved = whole["textures"] - before
    # Patches that started in this turn have no texture before it.
    known = quarter["targets"] >= 0
    known &= (before != 0).flatten(1).any(1)
    assert moved[known].any()
    torch.testing.assert_close((quarter["textures"] - before)[known], 0.25 * moved[known])


def test_no_patch_moves_by_more_than_its_steps(toy):
    memory = {}
    for seed in range(3):
        turn(toy, memory, seed=seed, steps=0, **MAT)
    before = memory["textures"].clone()
    turn(toy, memory, seed=3, steps=3, **{**MAT, "pool_write_back": 1.0})
    known = (before != 0).flatten(1).any(1)
    moved = (memory["textures"] - before).abs().amax((1, 2, 3))
    assert (moved <= 3.001 * memory["steps"])[known].all()
    assert moved[known].any()


@pytest.mark.slow
def test_a_pool_by_other_rules_gets_strong_too(toy):
    young, old = {}, {}
    rules = {**MAT, "pool_size": 20}
    turn(toy, young, **rules)
    for seed in range(25):
        turn(toy, old, seed=seed, steps=5, **rules)
    assert wrong_share(toy, old, **rules) > wrong_share(toy, young, **rules) + 0.1


def test_a_pool_that_was_saved_goes_on_bit_for_bit(toy):
    one, saved = {}, {}
    for seed in range(2):
        turn(toy, one, seed=seed, **MAT)
    saved = {name: kept.clone() for name, kept in one.items()}
    last = [turn(toy, memory, seed=2, **MAT)[2] for memory in (one, saved)]
    assert torch.equal(*last)
    assert all(torch.equal(one[name], saved[name]) for name in one)


@pytest.mark.parametrize("fields", [{"pool_write_back": 1.5}, {"pool_size": 0}, {"pool_targets": "random"}])
def test_bad_rules(fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        AQapa(universal=0.5, **fields)
