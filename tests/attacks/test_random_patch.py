import torch

from qadtr_brevitas.attacks.random_patch import RandomPatch
from tests.attacks.support import accuracy, attacked, spy


def fit(seed, **fields):
    images, labels = torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.zeros(2, dtype=torch.long)
    # No model: a patch of noise must not look at one.
    return RandomPatch(**fields).fit(None, images, labels, held_out=(images, labels), seed=seed)


def test_noise_of_the_given_seed():
    first, again, other = (fit(seed, area=0.25) for seed in (0, 0, 1))
    assert first.size == (32, 32)
    assert torch.equal(first.texture, again.texture)
    assert not torch.equal(first.texture, other.texture)
    assert abs(first.texture.mean() - 0.5) < 0.02
    assert first.texture.unique().numel() == 256
    assert first.meta["attack"] == "random-patch"


def test_shape_and_place():
    patch = fit(0, size=8, shape="disc", place=(5, 6))
    assert patch.pixels == 52
    assert patch.place == (5, 6)


def test_the_best_of_several_draws_for_every_image(toy):
    seen = []
    best = attacked(toy, RandomPatch(size=5, draws=20), model=spy(toy.model, seen))
    assert len(seen) == 20
    everywhere = torch.stack([(toy.model(images).argmax(1) == toy.test[1][:100]) for images in seen])
    assert accuracy(toy, best) == everywhere.all(0).float().mean()
    assert accuracy(toy, best) < accuracy(toy, attacked(toy, RandomPatch(size=5, draws=1)))


def test_every_image_has_a_patch_and_a_place_of_its_own(toy):
    images = attacked(toy, RandomPatch(size=5, draws=1))
    changed = (images != toy.test[0][:100].float() / 255).any(1)
    assert len({tuple(mask.flatten().tolist()) for mask in changed}) > 60
    assert len(images[changed[:, None].expand_as(images)].unique()) == 256
