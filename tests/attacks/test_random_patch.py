import torch

from qadtr_brevitas.attacks.random_patch import RandomPatch


def fit(seed, **fields):
    images, labels = torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.zeros(2, dtype=torch.long)
    # No model: a patch of noise must not look at one.
    return RandomPatch(**fields).fit(None, images, labels, held_out=(images, labels), seed=seed)


def test_noise_of_the_given_seed():
    first, again, other = (fit(seed, np=0.25) for seed in (0, 0, 1))
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
