from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qadtr_brevitas.attacks.geometry import random_corners
from qadtr_brevitas.auditing.search import (
    PatchedImages,
    cross_entropy,
    dlr,
    gradient_of,
    margin,
    search,
    tempered,
    towards,
)
from qadtr_brevitas.core.seeding import generator
from tests.auditing.conftest import SIDE, Trained

SIZE = 4


def scene_of(trained: Trained, count: int = 40) -> PatchedImages:
    images, labels = trained.split.batch(torch.arange(count))
    corners = random_corners(count, (SIDE, SIDE), (SIZE, SIZE), generator=generator(0, "places"))
    return PatchedImages(images, labels, corners)


def noise(count: int = 40) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=generator(0, "start"))


def test_the_search_breaks_images_that_noise_does_not(trained: Trained) -> None:
    scene = scene_of(trained)
    trace = search(trained.net, scene, noise(), steps=20, marks=(5,))
    assert set(trace.best) == {5, 20}
    with torch.no_grad():
        margins = {step: margin(trained.net(scene.put(best)), scene.labels) for step, best in trace.best.items()}
        start = margin(trained.net(scene.put(noise())), scene.labels)
    assert bool((margins[20] <= margins[5]).all())
    assert bool((margins[5] <= start).all())
    assert (margins[20] < 0).float().mean() > (start < 0).float().mean() + 0.2


def test_only_the_patch_changes_and_it_has_8_bit(trained: Trained) -> None:
    scene = scene_of(trained)
    patched = scene.put(search(trained.net, scene, noise(), steps=3).last)
    assert torch.equal((patched * 255).round() / 255, patched)
    changed = (patched != scene.images).any(1).flatten(1).sum(1)
    assert int(changed.max()) <= SIZE**2
    assert all(parameter.grad is None for parameter in trained.net.parameters())


def test_every_iterate_is_judged_the_last_one_included(trained: Trained) -> None:
    scene = scene_of(trained)
    trace = search(trained.net, scene, noise(), steps=1)
    assert trace.losses.shape == (2, 40)
    with torch.no_grad():
        assert torch.equal(trace.losses[1], cross_entropy(trained.net(scene.put(trace.last)), scene.labels))


def test_aims_replace_the_labels_in_the_objective_only(trained: Trained) -> None:
    scene = scene_of(trained)
    aims = (scene.labels + 1) % 5
    aimed = PatchedImages(scene.images, scene.labels, scene.corners, aims)
    patches = search(trained.net, aimed, noise(), steps=20, objective=towards).last
    with torch.no_grad():
        before, after = trained.net(scene.put(noise())), trained.net(scene.put(patches))
    assert towards(after, aims).mean() < towards(before, aims).mean() - 0.5


def test_gradients_that_are_not_numbers_are_counted_and_do_no_harm(trained: Trained) -> None:
    def overflowing(images: Tensor) -> Tensor:
        # The square root has an infinite slope at zero.
        return trained.net(images) + (images * 0).sum((1, 2, 3), keepdim=False)[:, None].sqrt()

    trace = search(overflowing, scene_of(trained), noise(), steps=2)
    assert bool(trace.broken.all())
    assert bool(trace.last.isfinite().all())


def test_an_interrupted_way_back_gives_zero_gradients() -> None:
    patches = torch.rand(2, 3, 1, 1, requires_grad=True)
    assert torch.equal(gradient_of(torch.ones(2), patches), torch.zeros_like(patches))
    unrelated = torch.ones(2, requires_grad=True)
    assert torch.equal(gradient_of(unrelated * 2, patches), torch.zeros_like(patches))


def test_objectives() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 4.0, 2.0]])
    labels = torch.tensor([0, 2])
    assert torch.equal(margin(logits, labels), torch.tensor([2.0, -2.0]))
    assert torch.allclose(dlr(logits, labels), torch.tensor([2 / 3, -2 / 4]))
    assert torch.allclose(dlr(100 * logits, labels), dlr(logits, labels))
    assert torch.allclose(tempered(10)(logits, labels), cross_entropy(10 * logits, labels))
    assert torch.isfinite(dlr(torch.zeros(1, 3), torch.tensor([0]))).all()


@pytest.mark.parametrize("steps", [1, 4])
def test_the_same_start_gives_the_same_patches(trained: Trained, steps: int) -> None:
    first, second = (search(trained.net, scene_of(trained), noise(), steps=steps).last for _ in range(2))
    assert torch.equal(first, second)
