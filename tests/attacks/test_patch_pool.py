import pytest
import torch
from pydantic import ValidationError

from qadtr_brevitas.attacks.a_qapa import AQapa
from qadtr_brevitas.attacks.fake_quantize import fake_quantize
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


def wrong_share(toy, memory):
    """How many of the training images are misclassified under the patches as they are, mean over some steps."""
    shares = []
    for seed in range(100, 110):
        _, labels, patched = turn(toy, {name: kept.clone() for name, kept in memory.items()}, seed=seed, steps=0)
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
