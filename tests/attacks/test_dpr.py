import math
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError

from qadtr_brevitas.attacks import dpr
from qadtr_brevitas.attacks.dpr import Dpr, RayBounds
from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.attacks.polygon import polygon_mask
from qadtr_brevitas.attacks.random_patch import RandomPatch
from qadtr_brevitas.attacks.shapes import bounding_box
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.seeding import generator

FAST = {"size": 5, "steps": 60, "batch_size": 32, "check_every": 20}


def fit(toy, *, seed=0, model=None, progress=None, **fields):
    attack = Dpr(**{**FAST, **fields})
    return attack.fit(model or toy.model, toy.images, toy.labels, held_out=toy.held_out, seed=seed, progress=progress)


def noise_under(patch):
    """A random texture under the same mask."""
    texture = torch.randint(256, patch.texture.shape, generator=generator(0, "noise")) / 255
    return Patch(texture=texture, mask=patch.mask, place=patch.place, keep_out=patch.keep_out)


@pytest.mark.parametrize("target", [0, 2])
@pytest.mark.parametrize("step_rule", ["sgd", "sign", "adam"])
def test_a_targeted_patch_beats_noise_of_its_shape_by_far(toy, target, step_rule):
    patch = fit(toy, target=target, step_rule=step_rule)
    assert toy.success_rate(patch, target) > toy.success_rate(noise_under(patch), target) + 0.4
    assert patch.meta["threat_model"] == "universal targeted"
    assert patch.meta["attack"] == "dpr"


def test_an_untargeted_patch_lowers_accuracy(toy):
    patch = fit(toy, target=None)
    assert toy.success_rate(patch, None) > toy.success_rate(noise_under(patch), None) + 0.4


@pytest.mark.slow
def test_the_shape_is_searched_too(toy):
    """With a texture that cannot help, the shape alone still finds what covers most."""
    still, moved = (fit(toy, ray_lr=rate, shape_share=1.0) for rate in (1e-9, 0.2))
    assert not (still.mask.shape == moved.mask.shape and torch.equal(still.mask, moved.mask))
    assert abs(still.size[0] - still.size[1]) <= 1


@pytest.mark.parametrize("budget", [{"size": 1}, {"size": 4}, {"size": 8}, {"size": 12}, {"size": 16}, {"area": 0.1}])
def test_the_exact_mask_never_exceeds_the_budget(toy, budget):
    allowed = int(RandomPatch(**budget).mask((16, 16)).sum())
    for share in (0.5, 1.0):
        # Rays pulled hard, without an area penalty: only the scaling holds them.
        patch = fit(
            toy, **{"size": None, **budget}, steps=8, check_every=2, ray_lr=1.0, area_weight=0, shape_share=share
        )
        assert patch.pixels <= allowed
        if allowed <= 64:
            assert patch.pixels >= allowed - 3
        assert bounding_box(patch.mask) == (0, 0, *patch.size)


def test_the_budget_may_be_that_of_a_disc_or_rectangle(toy):
    assert fit(toy, shape="disc", size=6, steps=2).pixels == 32
    assert fit(toy, shape="rectangle", size=(3, 7), steps=2).pixels == 21


def test_the_shape_is_smaller_if_the_window_is(toy):
    patch = fit(toy, shape="rectangle", size=(2, 14), place=(14, 0), steps=2)
    assert patch.size == (1, 1)
    assert fit(toy, size=8, place=(8, 8), steps=2).size == (7, 7)


def test_the_mask_is_exact_and_the_texture_on_the_grid(toy):
    patch = fit(toy, steps=20, shape_share=1.0)
    assert patch.mask.dtype == torch.bool
    assert torch.equal((patch.texture * 255).round() / 255, patch.texture)


@pytest.mark.parametrize("fields", [{}, {"place": (3, 4)}, {"place": (11, 11)}, {"keep_out": (5, 5, 6, 6), "size": 3}])
def test_only_masked_pixels_change_and_places_are_kept(toy, fields):
    patch = fit(toy, **{"steps": 10, "check_every": 5, **fields})
    images = toy.images[:100].float() / 255
    patched = patch.apply(images, generator=generator(0))
    assert ((patched != images).any(1).sum((1, 2)) <= patch.pixels).all()
    if "place" in fields:
        assert patch.place == fields["place"]
    if "keep_out" in fields:
        assert torch.equal(patched[..., 5:11, 5:11], images[..., 5:11, 5:11])


def test_training_blends_under_the_soft_mask_and_scoring_pastes_under_the_exact_one(toy):
    seen = {True: [], False: []}

    def spy(images):
        seen[images.requires_grad].append(images.detach())
        return toy.model(images)

    flat = torch.full_like(toy.images, 255)
    labels = toy.model(flat[:1].float() / 255).argmax(1).expand(len(flat))
    target = (int(labels[0]) + 1) % 4
    Dpr(size=5, steps=6, check_every=3, batch_size=16, target=target, init="gray", lr=0.01).fit(
        spy, flat, labels, held_out=(flat[:50], labels[:50]), seed=0
    )
    # The first 50 are for choosing those that count. A half-covered pixel is lighter than the gray of the patch gets.
    soft, exact = torch.cat(seen[True][:3]), torch.cat(seen[False])[50:]
    assert ((soft > 0.95) & (soft < 1)).any()
    assert not ((exact > 0.95) & (exact < 1)).any()
    covered = (exact < 1).any(1).sum((1, 2))
    assert (covered == 25).all()
    assert len(seen[True]) == 6


def test_the_border_is_sharpened_with_a_start_that_suits_the_size(monkeypatch, toy):
    used = []
    plain = dpr.soft_polygon_mask
    monkeypatch.setattr(
        dpr,
        "soft_polygon_mask",
        lambda rays, size, *, sharpness: used.append(sharpness) or plain(rays, size, sharpness=sharpness),
    )
    fit(toy, size=8, steps=8, shape_share=0.5)
    radius = math.sqrt(64 / math.pi)
    assert used[0] == pytest.approx(4.5 * radius)
    assert used[-1] == pytest.approx(100)
    assert [later / first for first, later in pairwise(used)] == pytest.approx([used[1] / used[0]] * 3)
    used.clear()
    fit(toy, steps=4, shape_share=1.0, sharpness=(7, 7))
    assert used == [7] * 4


def test_every_ray_gets_a_gradient_at_the_start_and_none_is_accumulated(monkeypatch, toy):
    """The gradient of each step is that step's own: not zero, and never added to the one before."""
    given, used = [], []
    grad = torch.autograd.grad

    def spy(loss, inputs):
        gradients = grad(loss, inputs)
        given.append([one.clone() for one in gradients])
        return gradients

    step = torch.optim.Adam.step

    def spy_step(optimizer, *arguments, **options):
        used.append([parameter.grad.clone() for parameter in optimizer.param_groups[0]["params"]])
        return step(optimizer, *arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", spy)
    monkeypatch.setattr(torch.optim.Adam, "step", spy_step)
    fit(toy, steps=4, shape_share=1.0, size=6)
    assert len(given) == 4
    for (for_texture, for_rays), (texture_used,), (rays_used,) in zip(given, used[::2], used[1::2], strict=True):
        assert torch.equal(for_texture, texture_used)
        assert torch.equal(for_rays, rays_used)
    assert (given[0][1] != 0).all()


def test_the_network_gets_no_gradients(toy):
    fit(toy, steps=4)
    assert all(parameter.grad is None for parameter in toy.model.parameters())


def test_the_same_seed_gives_the_same_patch(toy):
    first, again, other = (fit(toy, steps=20, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.texture, again.texture)
    assert torch.equal(first.mask, again.mask)
    assert not (first.mask.shape == other.mask.shape and torch.equal(first.mask, other.mask))


@pytest.mark.slow
def test_the_best_is_kept_with_its_own_mask(toy):
    long = fit(toy, steps=40, check_every=5)
    last = fit(toy, steps=40, check_every=40)
    assert long.meta["held_out_asr"] >= last.meta["held_out_asr"]
    three = fit(toy, steps=10, target=1, restarts=3)
    assert three.meta["held_out_asr"] >= fit(toy, steps=10, target=1).meta["held_out_asr"]


def test_progress_counts_the_steps_of_both_phases(toy):
    reports = []
    fit(toy, steps=6, restarts=2, progress=lambda done, total, note="": reports.append((done, total)))
    assert reports == [(done, 12) for done in range(1, 13)]


def test_a_saved_patch_scores_the_same(toy, tmp_path):
    patch = fit(toy, steps=20)
    loaded = Patch.load(patch.save(tmp_path / "a"))
    assert torch.equal(loaded.mask, patch.mask)
    assert toy.success_rate(loaded, 0) == toy.success_rate(patch, 0)
    assert loaded.meta["settings"]["rays"] == 36


@pytest.mark.parametrize("count", [3, 7, 36, 50])
def test_bounds_hold_for_any_rays(count):
    bounds = RayBounds.of(Dpr(rays=count), pixels=64, image_size=(32, 32), device=torch.device("cpu"))
    for seed in range(20):
        wild = 12 * torch.rand(count, generator=generator(seed, "wild")) - 1
        projected = bounds.project(wild)
        pixels = polygon_mask(projected, bounds.window).sum()
        assert pixels <= 64
        assert (projected > 0).all()
        assert (projected <= bounds.longest).all()
        assert projected.max() <= 2 * math.sqrt(64 / math.pi) * (1 + 1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rays": 2}, "greater than or equal to 3"),
        ({"shape_share": 0}, "greater than 0"),
        ({"sharpness": (0, 100)}, "greater than 0"),
        ({"longest": 0.5}, "greater than or equal to 1"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValidationError, match=message):
        Dpr(**fields)


def test_bad_requests(toy):
    with pytest.raises(UsageError, match="20x20 patch is larger than the 16x16 image"):
        fit(toy, size=20)
    with pytest.raises(UsageError, match=r"7.*0 to 3"):
        fit(toy, target=7)
