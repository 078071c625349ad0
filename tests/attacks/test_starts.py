from dataclasses import replace

import pytest
import torch

from qadtr_brevitas.attacks.dpr import Dpr
from qadtr_brevitas.attacks.lavan import Lavan
from qadtr_brevitas.attacks.location_patch import LocationPatch
from qadtr_brevitas.attacks.per_image import PatchTask
from qadtr_brevitas.attacks.results import AttackGoal
from qadtr_brevitas.attacks.starts import best_picture, shrunk, start_patches, start_texture
from qadtr_brevitas.core.errors import DataError
from qadtr_brevitas.core.seeding import generator


def test_noise_and_gray():
    assert (start_texture("gray", (2, 3), channels=3, generator=generator(0)) == 0.5).all()
    uniform = start_texture("uniform", (50, 50), channels=3, generator=generator(0))
    assert uniform.shape == (3, 50, 50)
    assert abs(uniform.mean() - 0.5) < 0.02


def test_the_best_picture_is_the_one_with_the_lowest_loss():
    pictures = torch.linspace(0, 1, 40)[:, None, None, None].expand(40, 3, 16, 16)
    best = best_picture(pictures, (4, 5), loss=lambda texture: abs(texture.mean().item() - 0.5), generator=generator(0))
    assert best.shape == (3, 4, 5)
    assert best.mean().item() == pytest.approx(0.5, abs=0.02)


def test_a_universal_patch_starts_from_a_picture_of_its_target(toy):
    """Without a step that could do anything, what is left is one of the target's pictures."""
    patch = fit(toy, init="image", target=2)
    pictures = shrunk(toy.images[toy.labels == 2].float() / 255, (6, 6))
    assert (pictures - patch.texture).abs().amax((1, 2, 3)).min() < 1 / 255


def fit(toy, *, images=None, labels=None, **fields):
    attack = Lavan(**{"size": 6, "steps": 1, "lr": 1e-9, "batch_size": 32, "check_every": 1, **fields})
    images, labels = (toy.images, toy.labels) if images is None else (images, labels)
    return attack.fit(toy.model, images, labels, held_out=toy.held_out, seed=0)


@pytest.mark.slow
def test_of_two_restarts_one_starts_from_noise(toy):
    fields = {"steps": 15, "lr": None, "target": 2}
    picture, both = fit(toy, init="image", **fields), fit(toy, init="image", restarts=2, **fields)
    assert both.meta["held_out_asr"] > picture.meta["held_out_asr"]
    assert both.meta["settings"]["init"] == "image"
    assert (shrunk(toy.images.float() / 255, (6, 6)) - both.texture).abs().amax((1, 2, 3)).min() > 0.3


def test_init_image_needs_a_picture_of_the_target(toy):
    others = toy.labels != 2
    with pytest.raises(DataError, match=r"no image of class 2 to start from.*init=uniform"):
        fit(toy, init="image", target=2, images=toy.images[others], labels=toy.labels[others])


def test_a_searched_shape_starts_from_a_picture(toy):
    attack = Dpr(size=6, steps=4, shape_share=0.5, target=2, batch_size=32, init="image", lr=1e-9, ray_lr=1e-9)
    patch = attack.fit(toy.model, toy.images, toy.labels, held_out=toy.held_out, seed=0)
    height, width = patch.mask.shape
    pictures = shrunk(toy.images[toy.labels == 2].float() / 255, (height, width))
    assert ((pictures - patch.texture) * patch.mask).abs().amax((1, 2, 3)).min() < 1 / 255


@pytest.mark.parametrize("target", [None, 1])
def test_per_image_patches_start_from_other_images(toy, target):
    images, labels = toy.test[0][:40].float() / 255, toy.test[1][:40]
    mask = torch.ones(5, 5, dtype=torch.bool)
    task = PatchTask(model=toy.model, images=images, mask=mask, goal=AttackGoal.of(target, labels, loss="margin"))
    corners = torch.zeros(40, 2, dtype=torch.int64)
    noise = start_patches("uniform", task, corners, generator=generator(1))
    started = start_patches("image", task, corners, generator=generator(1))
    distance = (started[:, None] - shrunk(images, (5, 5))).abs().amax((2, 3, 4))
    taken = distance.min(1).values == 0
    assert taken.any()
    # What is no picture is the noise it would have been.
    assert torch.equal(started[~taken], noise[~taken])
    source = labels[distance.argmin(1)][taken]
    assert (source != labels[taken]).all() if target is None else (source == target).all()
    with torch.no_grad():
        losses = [task.assess(patches, corners).losses for patches in (started, noise)]
    assert (losses[0] <= losses[1]).all()


@pytest.mark.parametrize("attack", [Lavan(size=5, steps=1, lr=1e-9, target=None), LocationPatch(size=5, steps=0)])
def test_per_image_attacks_follow_init(toy, attack):
    images, labels = toy.test[0][:40].float() / 255, toy.test[1][:40]
    attacked = [
        replace(attack, init=init).run(toy.model, images, labels, generator=generator(0))
        for init in ("image", "uniform", "gray")
    ]
    wrong = [(toy.model(patched).argmax(1) != labels).float().mean() for patched in attacked]
    assert not torch.equal(attacked[0], attacked[1])
    assert wrong[0] >= wrong[1]
    changed = (attacked[2] != images).any(1)
    assert (attacked[2].permute(0, 2, 3, 1)[changed] * 255 - 127.5).abs().max() < 1
