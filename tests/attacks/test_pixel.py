import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from qadtr_brevitas.attacks.pixel import Fgsm, MiFgsm, Pgd
from qadtr_brevitas.config import Recipe
from qadtr_brevitas.core.seeding import generator
from qadtr_brevitas.quant import calibrate, convert
from tests.attacks.support import accuracy, attacked, sample, target_rate

EPS = 0.06
ALL = [Fgsm(eps=EPS), Pgd(eps=EPS), MiFgsm(eps=EPS)]
NAMES = ["fgsm", "pgd", "mi-fgsm"]
each = pytest.mark.parametrize("attack", ALL, ids=NAMES)


def gradient(toy, images, labels):
    images = images.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(toy.model(images), labels, reduction="sum"), images)[0]


@each
def test_it_lowers_accuracy_where_noise_of_that_size_does_not(toy, attack):
    images, _ = sample(toy)
    noise = images + EPS * torch.empty_like(images).uniform_(-1, 1, generator=generator(0)).sign()
    assert accuracy(toy, noise.clamp(0, 1)) > 0.95
    assert accuracy(toy, attacked(toy, attack)) < (0.7 if isinstance(attack, Fgsm) else 0.1)


@each
@pytest.mark.parametrize("eps", [0.015, 0.3])
def test_no_value_moves_further_than_eps_or_out_of_range(toy, attack, eps):
    images, _ = sample(toy)
    adversarial = attacked(toy, type(attack)(eps=eps))
    assert (adversarial - images).abs().max() <= eps + 1e-6
    assert (adversarial - images).abs().max() > 0.9 * eps
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1


@each
def test_eps_0_changes_nothing(toy, attack):
    torch.testing.assert_close(attacked(toy, type(attack)(eps=0)), sample(toy)[0])


def test_fgsm_is_one_step_of_the_sign_uphill(toy):
    images, labels = sample(toy)
    expected = (images + EPS * gradient(toy, images, labels).sign()).clamp(0, 1)
    torch.testing.assert_close(attacked(toy, Fgsm(eps=EPS)), expected, atol=1e-6, rtol=0)


def test_pgd_by_hand(toy):
    images, labels = sample(toy)
    expected = images
    for _ in range(7):
        step = expected + EPS / 4 * gradient(toy, expected, labels).sign()
        expected = torch.clamp(step, images - EPS, images + EPS).clamp(0, 1)
    adversarial = attacked(toy, Pgd(eps=EPS, steps=7, random_start=False))
    torch.testing.assert_close(adversarial, expected, atol=1e-5, rtol=0)


def test_mi_fgsm_by_hand(toy):
    images, labels = sample(toy)
    expected, average = images, torch.zeros_like(images)
    for _ in range(5):
        slope = gradient(toy, expected, labels)
        average = 0.5 * average + slope / slope.abs().mean((1, 2, 3), keepdim=True)
        expected = torch.clamp(expected + 0.01 * average.sign(), images - EPS, images + EPS).clamp(0, 1)
    adversarial = attacked(toy, MiFgsm(eps=EPS, alpha=0.01, steps=5, decay=0.5))
    torch.testing.assert_close(adversarial, expected, atol=1e-5, rtol=0)


def test_pgd_without_steps_is_its_start(toy):
    images, _ = sample(toy)
    torch.testing.assert_close(attacked(toy, Pgd(steps=0, random_start=False)), images)
    start = attacked(toy, Pgd(eps=EPS, steps=0)) - images
    assert start.abs().max() <= EPS + 1e-6
    assert start.mean().abs() < 0.01
    assert start.std() == pytest.approx(EPS / 3**0.5, rel=0.05)


def test_20_steps_do_more_than_7(toy):
    few, many = (accuracy(toy, attacked(toy, Pgd(eps=0.05, alpha=0.005, steps=steps))) for steps in (7, 20))
    assert many < few


def test_restarts_keep_the_best_for_every_image(toy):
    one = attacked(toy, Pgd(eps=0.06, steps=3))
    many = attacked(toy, Pgd(eps=0.06, steps=3, restarts=5))
    assert accuracy(toy, many) < accuracy(toy, one)


@each
def test_a_target_is_raised(toy, attack):
    targeted = type(attack)(eps=0.1, target=1)
    reached = target_rate(toy, attacked(toy, targeted), 1)
    assert reached > (0.15 if isinstance(attack, Fgsm) else 0.9)
    assert target_rate(toy, attacked(toy, type(attack)(eps=0.1)), 1) < reached


@each
def test_gradients_of_the_caller_are_kept(toy, attack):
    """Libraries call backward, which would add to them."""
    parameters = list(toy.model.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    try:
        attacked(toy, attack, count=10)
        assert all((parameter.grad == 1).all() for parameter in parameters)
    finally:
        for parameter in parameters:
            parameter.grad = None


@each
def test_a_vanishing_gradient_leaves_the_images_finite(toy, attack):
    """MI-FGSM divides by the size of the gradient: zero by zero."""
    images, labels = sample(toy, 20)
    adversarial = attack.run(lambda images: 1e4 * toy.model(images), images, labels, generator=generator(0))
    assert adversarial.isfinite().all()
    assert (adversarial - images).abs().max() <= EPS + 1e-6


def test_a_step_without_a_gradient_does_not_end_mi_fgsm(toy):
    """The library's MI-FGSM divides zero by zero there, and the image is lost."""
    images, labels = sample(toy, 40)
    calls = 0

    def sometimes_flat(images):
        nonlocal calls
        calls += 1
        return toy.model(images) * (0 if calls == 1 else 1)

    attack = MiFgsm(eps=EPS)
    adversarial = attack.run(sometimes_flat, images, labels, generator=generator(0))
    assert calls == 10
    assert accuracy(toy, adversarial) < 0.1


@each
def test_white_pixels_of_a_quantized_network_can_get_darker(attack):
    """An 8-bit input quantizer has 127 steps for values of up to 127.5, so that white is clipped."""
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([1.0, -1.0])[:, None, None, None].expand(2, 3, 1, 1))
    model = convert(network.eval(), [8], mean=[0.5] * 3, std=[0.5] * 3, image_size=(4, 4))
    calibrate(model, [torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])], method="minmax")
    images = torch.full((2, 3, 4, 4), 0.5)
    images[..., :2] = 1.0
    adversarial = type(attack)(eps=EPS).run(model, images, torch.zeros(2, dtype=torch.long), generator=generator(0))
    torch.testing.assert_close(adversarial, images - EPS, rtol=0, atol=1e-5)


@each
def test_it_runs_under_no_grad(toy, attack):
    with torch.no_grad():
        quiet = attacked(toy, attack)
    assert torch.equal(quiet, attacked(toy, attack))


def test_pgd_can_be_a_training_attack():
    attack = Recipe.model_validate({"train": {"attack": {"name": "pgd", "steps": 7}}}).train.attack
    assert attack == Pgd(steps=7)
    assert attack.share == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"eps": 8}, "less than or equal to 1"), ({"alpha": 0}, "greater than 0"), ({"steps": -1}, "greater than")],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValidationError, match=message):
        Pgd(**fields)
