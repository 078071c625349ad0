import pytest
import torch
from pydantic import ValidationError

from qadtr_brevitas.attacks.a_qapa import AQapa
from qadtr_brevitas.attacks.fake_quantize import fake_quantize
from qadtr_brevitas.attacks.starts import shrunk
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.core.seeding import generator
from tests.attacks.support import predictions, spy


def run(toy, *, seed=0, bits=32, count=200, model=None, **fields):
    images, labels = toy.test[0][:count].float() / 255, toy.test[1][:count]
    attack = AQapa(**{"sizes": (5,), **fields})
    precision = Precision.parse(bits)
    patched = attack.run(model or toy.model, images, labels, generator=generator(seed, "a-qapa"), precision=precision)
    return images, labels, patched


def accuracy(toy, images, labels):
    with torch.no_grad():
        return (toy.model(images).argmax(1) == labels).float().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, 8, 4])
def test_five_steps_beat_noise_by_far(toy, bits):
    _, labels, noise = run(toy, bits=bits, steps=0)
    _, _, patched = run(toy, bits=bits)
    assert accuracy(toy, patched, labels) < accuracy(toy, noise, labels) - 0.3
    assert not patched.requires_grad


def test_more_steps_do_more(toy):
    _, labels, few = run(toy, steps=1)
    _, _, many = run(toy, steps=10)
    assert accuracy(toy, many, labels) < accuracy(toy, few, labels)


def test_a_targeted_patch_raises_another_class(toy):
    _, labels, noise = run(toy, steps=0)
    _, _, patched = run(toy, targeted=True, steps=10)
    assert accuracy(toy, patched, labels) < accuracy(toy, noise, labels) - 0.2


@pytest.mark.parametrize("shape", ["square", "disc"])
@pytest.mark.parametrize("quantize_image", [False, True])
@pytest.mark.parametrize("bits", [32, 4, "w8a2"])
def test_only_masked_pixels_change_apart_from_the_quantized_image(toy, shape, quantize_image, bits):
    images, _, patched = run(toy, bits=bits, shapes=(shape,), quantize_image=quantize_image)
    background = fake_quantize(images, Precision.parse(bits).act) if quantize_image else images
    changed = (patched != background).any(1)
    rows, columns = changed.any(2), changed.any(1)
    assert (rows.sum(1) <= 5).all()
    assert (columns.sum(1) <= 5).all()
    pixels = 25 if shape == "square" else 21
    assert changed.sum((1, 2)).max() <= pixels
    if bits == 32:
        assert changed.sum((1, 2)).min() == pixels


@pytest.mark.parametrize(
    ("bits", "patch_bits", "levels"), [(4, "same", 16), ("w8a2", "same", 4), (32, 4, 16), (8, 2, 4)]
)
def test_the_patch_has_the_levels_of_its_own_bit_width(toy, bits, patch_bits, levels):
    images, _, patched = run(toy, bits=bits, patch_bits=patch_bits, quantize_image=False, shapes=("square",))
    changed = (patched != images).any(1, keepdim=True).expand_as(images)
    values = patched[changed]
    assert len(values.unique()) <= levels
    # A patch pixel may equal the image, so nothing here needs every level; but rounding must be to the grid.
    torch.testing.assert_close(values, (values * (levels - 1)).round() / (levels - 1))


def test_random_patch_bits_differ_between_batches(toy):
    levels = set()
    for seed in range(12):
        images, _, patched = run(toy, seed=seed, count=40, steps=0, patch_bits="random", quantize_image=False)
        levels.add(len(patched[(patched != images).any(1, keepdim=True).expand_as(images)].unique()))
    assert len(levels) >= 4
    assert {16, 32, 256} <= levels


def test_size_and_shape_are_drawn_once_per_batch_from_all_choices(toy):
    areas = set()
    for seed in range(40):
        images, _, patched = run(toy, seed=seed, count=8, sizes=(4, 6), steps=0)
        areas_of_batch = (patched != images).any(1).sum((1, 2)).unique()
        assert len(areas_of_batch) == 1
        areas.add(int(areas_of_batch))
    assert areas == {16, 12, 36, 32}


@pytest.mark.parametrize(("side", "sizes"), [(16, {3, 4, 5}), (32, {6, 8, 10}), (64, {12, 16, 20})])
def test_sizes_go_with_the_image(toy, side, sizes):
    images, attack, draw = torch.full((2, 3, side, side), 2.0), AQapa(shapes=("square",), steps=0), generator(0)
    runs = [attack.run(toy.model, images, torch.zeros(2).long(), generator=draw) for _ in range(30)]
    assert {int((patched[0, 0] != 2).sum()) for patched in runs} == {size * size for size in sizes}


def test_every_image_has_a_place_and_a_patch_of_its_own(toy):
    images, _, patched = run(toy, shapes=("square",), steps=0)
    changed = (patched != images).any(1)
    corners = torch.stack([changed.any(2).float().argmax(1), changed.any(1).float().argmax(1)], 1)
    assert len(corners.unique(dim=0)) > 80
    assert corners.max() == 11
    assert corners.min() == 0
    assert len(patched[changed[:, None].expand_as(patched)].unique()) > 10_000


def begins_at_a_picture(images, patched):
    """(N,) whether the square on each image is another one of them, made as small."""
    pictures = shrunk(images, (5, 5))
    changed = (patched != images).any(1)
    corners = torch.stack([changed.any(2).float().argmax(1), changed.any(1).float().argmax(1)], 1).tolist()
    patches = torch.stack(
        [image[:, row : row + 5, column : column + 5] for image, (row, column) in zip(patched, corners, strict=True)]
    )
    return (patches[:, None] - pictures).abs().amax((2, 3, 4)).amin(1) < 1e-6


@pytest.mark.parametrize(("init", "least", "most"), [("uniform", 0.0, 0.0), ("image", 0.9, 1.0), ("mixed", 0.3, 0.7)])
def test_patches_start_from_noise_pictures_or_either(toy, init, least, most):
    # Where a pixel of the picture equals the image's, the square looks smaller than it is, so not all are found.
    images, _, patched = run(toy, init=init, steps=0, shapes=("square",))
    assert least <= begins_at_a_picture(images, patched).float().mean() <= most


def test_keeping_the_best_leaves_the_iterates_as_they_are(toy):
    """Training, which keeps the last, sees what it saw before there was a choice."""
    seen = []
    _, _, last = run(toy, steps=4, patch_bits="random", noise=0.01)
    run(toy, steps=4, patch_bits="random", noise=0.01, keep_best=True, model=spy(toy.model, seen))
    assert len(seen) == 5
    assert torch.equal(seen[-1], last)


def test_the_best_iterate_is_kept_for_every_image(toy):
    seen = []
    _, labels, best = run(toy, steps=8, step_size=0.4, keep_best=True, model=spy(toy.model, seen))
    _, _, last = run(toy, steps=8, step_size=0.4)
    wrong = torch.stack([predictions(toy, iterate) != labels for iterate in seen])
    assert torch.equal(predictions(toy, best) != labels, wrong.any(0))
    assert accuracy(toy, best, labels) <= accuracy(toy, last, labels)


def test_restarts_draw_size_shape_and_places_anew(toy):
    _, labels, one = run(toy, keep_best=True)
    images, _, many = run(toy, keep_best=True, restarts=4, sizes=(3, 5))
    areas = (many != images).any(1).sum((1, 2))
    assert len(areas.unique()) > 1
    assert accuracy(toy, many, labels) < accuracy(toy, one, labels)


@pytest.mark.parametrize("target", [0, 1])
def test_a_given_target_is_raised(toy, target):
    _, labels, noise = run(toy, steps=0)
    _, _, patched = run(toy, target=target, steps=20, keep_best=True)
    others = labels != target
    rates = [(predictions(toy, images) == target)[others].float().mean() for images in (noise, patched)]
    assert rates[1] > rates[0] + 0.25


def test_noise_moves_the_quantizer_and_is_off_by_default(toy):
    _, _, plain = run(toy, bits=4, steps=0)
    _, _, noisy = run(toy, bits=4, steps=0, noise=0.01)
    assert len(plain.unique()) == 16
    assert not torch.equal(plain, noisy)
    assert noisy.min() >= 0
    assert noisy.max() <= 1
    assert len(noisy.unique()) <= 32


def test_the_same_generator_gives_the_same_images(toy):
    first, again, other = (run(toy, seed=seed, patch_bits="random", noise=0.01)[2] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_each_step_costs_one_forward_pass_and_leaves_no_gradients(toy):
    calls = []
    run(toy, model=lambda images: calls.append(len(images)) or toy.model(images), steps=5)
    assert calls == [200] * 5
    assert all(parameter.grad is None for parameter in toy.model.parameters())


def test_values_stay_in_range(toy):
    _, _, patched = run(toy, step_size=1.0)
    assert patched.min() >= 0
    assert patched.max() <= 1


def test_without_a_precision_nothing_is_quantized(toy):
    images, labels = toy.test[0][:4].float() / 255, toy.test[1][:4]
    patched = AQapa(sizes=(5,)).run(toy.model, images, labels, generator=generator(0))
    assert (patched == images).all(1).sum((1, 2)).min() >= 16 * 16 - 25


def test_a_size_larger_than_the_images_is_refused(toy):
    with pytest.raises(UsageError, match="40x40 patch is larger than the 16x16 image"):
        run(toy, sizes=(40,))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sizes": ()}, "at least 1 item"),
        ({"patch_bits": 20}, "patch_bits"),
        ({"share": 0}, "greater than 0"),
        ({"shapes": ("star",)}, "'square' or 'disc'"),
        ({"init": "picture"}, "'uniform', 'image', 'mixed' or 'pool'"),
        ({"step_sise": 0.1}, "step_sise"),
        ({"targeted": True, "target": 1}, "give only one of them"),
        ({"restarts": 3}, "restarts=3.*keep_best=true"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValidationError, match=message):
        AQapa(**fields)
