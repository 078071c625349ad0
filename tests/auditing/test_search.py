from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qadtr_brevitas.attacks.geometry import random_corners
from qadtr_brevitas.attacks.gradients import gradient_or_zero
from qadtr_brevitas.auditing.losses import cross_entropy, margin, targeted_cross_entropy
from qadtr_brevitas.auditing.search import AttackedImages, search
from qadtr_brevitas.core.seeding import generator
from tests.auditing.conftest import SIDE, Trained

SIZE = 4


def attacked_images(trained: Trained, count: int = 40) -> AttackedImages:
    images, labels = trained.split.batch(torch.arange(count))
    corners = random_corners(count, (SIDE, SIDE), (SIZE, SIZE), generator=generator(0, "places"))
    return AttackedImages(images, labels, corners)


def noise(count: int = 40) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=generator(0, "start"))


def test_the_search_breaks_images_that_noise_does_not(trained: Trained) -> None:
    attacked = attacked_images(trained)
    trace = search(trained.net, attacked, noise(), steps=20, marks=(5,))
    assert set(trace.best) == {5, 20}
    with torch.no_grad():
        margins = {
            step: margin(trained.net(attacked.with_patches(best)), attacked.labels) for step, best in trace.best.items()
        }
        start = margin(trained.net(attacked.with_patches(noise())), attacked.labels)
    assert bool((margins[20] <= margins[5]).all())
    assert bool((margins[5] <= start).all())
    assert (margins[20] < 0).float().mean() > (start < 0).float().mean() + 0.2


def test_only_the_patch_changes_and_it_has_8_bit(trained: Trained) -> None:
    attacked = attacked_images(trained)
    patched = attacked.with_patches(search(trained.net, attacked, noise(), steps=3).last)
    assert torch.equal((patched * 255).round() / 255, patched)
    changed = (patched != attacked.images).any(1).flatten(1).sum(1)
    assert int(changed.max()) <= SIZE**2
    assert all(parameter.grad is None for parameter in trained.net.parameters())


def test_every_iterate_is_assessed_including_the_last(trained: Trained) -> None:
    attacked = attacked_images(trained)
    trace = search(trained.net, attacked, noise(), steps=1)
    assert trace.losses.shape == (2, 40)
    with torch.no_grad():
        assert torch.equal(
            trace.losses[1], cross_entropy(trained.net(attacked.with_patches(trace.last)), attacked.labels)
        )


def test_targets_replace_the_labels_in_the_loss_only(trained: Trained) -> None:
    attacked = attacked_images(trained)
    targets = (attacked.labels + 1) % 5
    targeted = AttackedImages(attacked.images, attacked.labels, attacked.corners, targets)
    patches = search(trained.net, targeted, noise(), steps=20, loss=targeted_cross_entropy).last
    with torch.no_grad():
        before, after = trained.net(attacked.with_patches(noise())), trained.net(attacked.with_patches(patches))
    assert targeted_cross_entropy(after, targets).mean() < targeted_cross_entropy(before, targets).mean() - 0.5


def test_gradients_that_are_not_finite_are_counted_and_ignored(trained: Trained) -> None:
    def overflowing(images: Tensor) -> Tensor:
        # The square root has an infinite slope at zero.
        return trained.net(images) + (images * 0).sum((1, 2, 3), keepdim=False)[:, None].sqrt()

    trace = search(overflowing, attacked_images(trained), noise(), steps=2)
    assert bool(trace.not_finite.all())
    assert bool(trace.last.isfinite().all())


def test_an_interrupted_backward_pass_means_zero_gradients() -> None:
    patches = torch.rand(2, 3, 1, 1, requires_grad=True)
    assert torch.equal(gradient_or_zero(torch.ones(2), patches), torch.zeros_like(patches))
    unrelated = torch.ones(2, requires_grad=True)
    assert torch.equal(gradient_or_zero(unrelated * 2, patches), torch.zeros_like(patches))


@pytest.mark.parametrize("steps", [1, 4])
def test_the_same_start_gives_the_same_patches(trained: Trained, steps: int) -> None:
    first, second = (search(trained.net, attacked_images(trained), noise(), steps=steps).last for _ in range(2))
    assert torch.equal(first, second)
