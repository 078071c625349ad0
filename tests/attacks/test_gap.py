import pytest
import torch
from pydantic import ValidationError

from qadtr_brevitas.attacks.gap import Gap
from qadtr_brevitas.attacks.geometry import paste
from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.attacks.random_patch import RandomPatch
from qadtr_brevitas.attacks.transforms import rotate_patch
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.seeding import generator

FAST = {"size": 6, "steps": 60, "batch_size": 32, "check_every": 20}


def fit(toy, *, seed=0, model=None, progress=None, **fields):
    attack = Gap(**{**FAST, **fields})
    return attack.fit(model or toy.model, toy.images, toy.labels, held_out=toy.held_out, seed=seed, progress=progress)


def noise(toy, **fields):
    attack = RandomPatch(**{"size": 6, "shape": "disc", **fields})
    return attack.fit(toy.model, toy.images, toy.labels, held_out=toy.held_out, seed=0)


def put(images, *, texture=None, seed=0, **fields):
    """Images with a white patch, or the one given, transformed."""
    attack = Gap(**{"size": 6, **fields})
    mask = attack.mask((images.shape[-2], images.shape[-1]))
    texture = torch.ones(3, *mask.shape) if texture is None else texture
    return attack.apply_texture(mask)(texture, images, generator(seed, "put"))


@pytest.mark.slow
@pytest.mark.parametrize("target", [0, 2])
@pytest.mark.parametrize("step_rule", ["sgd", "sign", "adam"])
def test_a_targeted_patch_beats_noise_by_far(toy, target, step_rule):
    patch = fit(toy, target=target, step_rule=step_rule)
    assert patch.pixels == 32
    assert toy.success_rate(patch, target) > toy.success_rate(noise(toy), target) + 0.3
    assert patch.meta["threat_model"] == "universal targeted"
    assert patch.meta["attack"] == "gap"


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["square", "disc"])
def test_an_untargeted_patch_lowers_accuracy(toy, shape):
    patch = fit(toy, target=None, shape=shape)
    assert toy.success_rate(patch, None) > toy.success_rate(noise(toy, shape=shape), None) + 0.3
    assert patch.meta["target"] is None


@pytest.mark.slow
def test_the_patch_works_turned(toy):
    patch = fit(toy, shape="square", degrees=45, steps=120)
    for degrees in (-40, 40):
        rotated = rotate_patch(patch.texture, patch.mask, degrees)
        turned = Patch(texture=(rotated.texture * 255).round() / 255, mask=rotated.mask)
        assert toy.success_rate(turned, 0) > toy.success_rate(noise(toy, shape="square"), 0) + 0.3


def test_contrast_and_brightness_are_drawn(toy):
    patch = fit(toy, contrast=0.2, brightness=0.1)
    assert toy.success_rate(patch, 0) > toy.success_rate(noise(toy), 0) + 0.3


@pytest.mark.slow
def test_the_same_seed_gives_the_same_patch(toy):
    first, again, other = (fit(toy, steps=10, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.texture, again.texture)
    assert not torch.equal(first.texture, other.texture)


def test_a_saved_patch_scores_the_same(toy, tmp_path):
    patch = fit(toy, steps=20)
    loaded = Patch.load(patch.save(tmp_path / "a"))
    assert toy.success_rate(loaded, 0) == toy.success_rate(patch, 0)
    assert loaded.meta["settings"]["scale"] == [0.9, 1.1]


def test_the_gradient_of_one_step_is_forgotten_in_the_next():
    """A network whose gradient is the same in every step moves the texture the same way in every step."""
    seen = []

    def model(images):
        seen.append(images.detach()[:, :, 4:8, 4:8].amax())
        return torch.stack([images.mean((1, 2, 3)), torch.full((len(images),), 0.1)], dim=1)

    black = torch.zeros(8, 3, 12, 12)
    labels = torch.ones(8, dtype=torch.long)
    still = {
        "degrees": 0,
        "scale": (1, 1),
        "place": (3, 3),
        "loss": "logits",
        "step_rule": "sgd",
        "lr": 21.6,
        "init": "gray",
    }
    attack = Gap(size=6, shape="square", target=0, steps=6, batch_size=8, check_every=6, cosine=False, **still)
    attack.fit(model, black, labels, held_out=(black, labels), seed=0)
    # The first is the choice of held-out images, the second the start's score, the last that of the last step.
    moves = torch.stack(seen[2:-1]).diff()
    torch.testing.assert_close(moves, moves[0].expand_as(moves), atol=1 / 255, rtol=0)
    assert moves[0].item() == pytest.approx(0.05, abs=1 / 255)


def test_the_network_gets_no_gradients(toy):
    fit(toy, steps=3)
    assert all(parameter.grad is None for parameter in toy.model.parameters())


def test_without_transforms_it_is_a_plain_patch():
    images = torch.rand(40, 3, 16, 16, generator=generator(0, "images"))
    texture = torch.rand(3, 6, 6, generator=generator(0, "texture"))
    plain = Gap(size=6, degrees=0, scale=(1, 1), place=(3, 9))
    expected = paste(images, texture, plain.mask((16, 16)), torch.tensor([[3, 9]]).expand(40, 2))
    torch.testing.assert_close(put(images, texture=texture, degrees=0, scale=(1, 1), place=(3, 9)), expected)


def test_the_patch_is_shifted_by_whole_pixels():
    """Between pixels interpolation would blur it."""
    texture = torch.rand(3, 6, 6, generator=generator(0, "texture"))
    anywhere = put(torch.zeros(400, 3, 16, 16), texture=texture, degrees=0, scale=(1, 1), shape="square")
    covered = anywhere.sum(1) > 0
    corners = torch.stack([covered.any(2).float().argmax(1), covered.any(1).float().argmax(1)], dim=1)
    expected = paste(torch.zeros(400, 3, 16, 16), texture, torch.ones(6, 6).bool(), corners)
    torch.testing.assert_close(anywhere, expected)
    assert len(corners.unique(dim=0)) > 110


def test_a_turned_patch_at_the_border_lies_on_whole_pixels():
    """Its turned corners must not leave the image, so it is moved inside: by whole pixels."""
    texture = torch.rand(3, 6, 6, generator=generator(0, "texture"))
    still = {"texture": texture, "shape": "square", "scale": (1, 1), "degrees": 0.5}
    in_corner = put(torch.zeros(50, 3, 16, 16), place=(0, 0), **still)
    inside = put(torch.zeros(50, 3, 16, 16), place=(1, 1), **still)
    torch.testing.assert_close(in_corner, inside)


@pytest.mark.parametrize("shape", ["square", "disc"])
def test_only_masked_pixels_change_and_black_pixels_are_not_holes(shape):
    images = 0.5 + 0.5 * torch.rand(50, 3, 16, 16, generator=generator(0, "images"))
    white, black = put(images * 0, shape=shape), put(images, texture=torch.zeros(3, 6, 6), shape=shape)
    covered = white[:, :1] > 0
    assert ((white == 1) | (white == 0)).all()
    assert torch.equal(black, images * ~covered)


@pytest.mark.parametrize("place", ["random", (0, 0), (1, 10), (10, 5)])
@pytest.mark.parametrize("shape", ["square", "disc"])
def test_the_patch_stays_whole_inside_the_image(shape, place):
    covered = put(torch.zeros(500, 3, 16, 16), shape=shape, place=place)[:, 0]
    pixels = covered.sum((1, 2))
    full = 36 if shape == "square" else 32
    # Scales of 0.9 to 1.1, and a few pixels more or less by where the centers fall.
    assert pixels.min() > full * 0.65
    assert pixels.max() < full * 1.45
    assert len(pixels.unique()) > 3


def test_the_scale_follows_the_option():
    images = torch.zeros(400, 3, 32, 32)
    pixels = put(images, size=32, scale=(0.1, 1.0), degrees=180)[:, 0].sum((1, 2))
    disc = 3.14159 * 16**2
    assert pixels.min() < 0.03 * disc
    assert 0.9 * disc < pixels.max() < 1.02 * disc


def test_every_image_has_a_place_and_a_turn_of_its_own():
    covered = put(torch.zeros(2000, 3, 16, 16), shape="square")[:, 0]
    assert len(covered.flatten(1).unique(dim=0)) > 700
    # A corner's own pixel takes a patch that is hardly turned and shifted as far as it goes.
    assert (torch.nn.functional.max_pool2d(covered.sum(0, keepdim=True), 2) > 0).all()
    assert torch.equal(covered, put(torch.zeros(2000, 3, 16, 16), shape="square")[:, 0])


def test_the_box_stays_free():
    covered = put(torch.zeros(3000, 3, 28, 28), shape="square", keep_out=(10, 10, 8, 8))[:, 0]
    assert covered[:, 10:18, 10:18].sum() == 0
    assert (covered.sum((1, 2)) > 20).all()


def test_light_changes_the_patch_only():
    images = torch.rand(50, 3, 16, 16, generator=generator(0, "images"))
    plain = put(images, texture=torch.full((3, 6, 6), 0.5), degrees=0, scale=(1, 1))
    lit = put(images, texture=torch.full((3, 6, 6), 0.5), degrees=0, scale=(1, 1), contrast=0.2, brightness=0.3)
    changed = lit != plain
    assert (changed.any(1).sum((1, 2)) == 32).all()
    assert lit[changed].min() > 0.1 - 1e-6
    assert lit[changed].max() < 0.9 + 1e-6
    assert lit[changed].max() - lit[changed].min() > 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": (1.1, 0.9)}, r"scale \[1.1, 0.9\] is the wrong way round"),
        ({"scale": (0, 1)}, "greater than 0"),
        ({"degrees": 200}, "less than or equal to 180"),
        ({"contrast": 1}, "less than 1"),
        ({"place": (0, 0), "keep_out": (1, 1, 2, 2)}, "give only one of place and keep_out"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValidationError, match=message):
        Gap(**fields)


def test_a_scale_too_large_for_the_image_is_refused(toy):
    with pytest.raises(UsageError, match=r"16x16.*1\.1.*16x16"):
        fit(toy, size=16)
    with pytest.raises(UsageError, match="20x20 patch is larger than the 16x16 image"):
        fit(toy, size=20)
    with pytest.raises(UsageError, match="no room for a 6x6 patch outside the box"):
        fit(toy, keep_out=(2, 2, 12, 12))
