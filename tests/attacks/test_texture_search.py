import pytest
import torch
from torch import nn

from qadtr_brevitas.attacks.descent import OptimizerSteps
from qadtr_brevitas.attacks.texture_search import search_texture
from qadtr_brevitas.core.errors import TrainingError
from qadtr_brevitas.core.seeding import generator

SLOPE = torch.linspace(-1, 1, 27).view(3, 3, 3)
IMAGES = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 1, 1)


def run(*, loss, score=lambda texture: 0.0, start=None, steps=2, batch_size=4, check_every=1, **changes):
    rule = {"step_rule": "sgd", "lr": 0.125, "cosine": False, **changes}
    return search_texture(
        torch.full((3, 3, 3), 128 / 255) if start is None else start,
        IMAGES,
        torch.zeros(len(IMAGES), dtype=torch.long),
        loss=loss,
        score=score,
        rule=OptimizerSteps(steps=steps, **rule),
        batch_size=batch_size,
        check_every=check_every,
        generator=generator(0, "batches"),
    )


def linear(texture, images, labels):
    return (texture * SLOPE).sum()


def last_of(**arguments):
    """Every texture that was scored, the last one at the end."""
    scored = []
    run(loss=linear, score=lambda texture: scored.append(texture) or 0.0, **arguments)
    return scored


def grid(texture):
    return (texture.clamp(0, 1) * 255).round() / 255


def test_two_equal_steps_make_two_equal_moves():
    """A gradient that accumulated would move three times as far."""
    moves = last_of(steps=2)[1:]
    expected = torch.full((3, 3, 3), 128 / 255) - 0.125 * SLOPE
    torch.testing.assert_close(moves[0], grid(expected))
    torch.testing.assert_close(moves[1], grid(expected - 0.125 * SLOPE))


def test_sign_steps():
    moves = last_of(steps=3, step_rule="sign", lr=0.05)
    torch.testing.assert_close(moves[-1], grid(128 / 255 - 3 * 0.05 * SLOPE.sign()))


def test_adam_starts_with_steps_of_lr():
    moves = last_of(steps=1, step_rule="adam", lr=0.05)
    # The slope's middle value is zero up to rounding, which Adam divides out.
    apart = SLOPE.abs() > 1e-3
    torch.testing.assert_close(moves[-1][apart], grid(128 / 255 - 0.05 * SLOPE.sign())[apart])


def test_the_cosine_ends_near_zero():
    assert (last_of(steps=100, step_rule="sign", lr=0.01, cosine=True)[-1] - 128 / 255).abs().max() < 0.51


def test_values_stay_in_range():
    final = last_of(steps=5, lr=10.0)[-1]
    assert final.min() == 0
    assert final.max() == 1


def test_a_pixel_that_reached_a_bound_can_leave_it():
    target = torch.full((3, 3, 3), 0.6)
    scored = []
    run(
        loss=lambda texture, images, labels: ((texture - target) ** 2).sum(),
        score=lambda texture: scored.append(texture) or 0.0,
        start=torch.zeros(3, 3, 3),
        steps=20,
        lr=0.25,
    )
    torch.testing.assert_close(scored[-1], target, rtol=0, atol=0.005)


def test_what_is_scored_and_returned_is_on_the_8_bit_grid():
    scored = []
    best = run(loss=linear, start=torch.rand(3, 3, 3, generator=generator(0)), score=lambda t: scored.append(t) or 0.0)
    for texture in (*scored, best.texture):
        assert torch.equal(texture, grid(texture))


def test_the_best_is_kept_not_the_last():
    scores = iter([0.0, 0.1, 0.7, 0.3, 0.2])
    scored = []
    best = run(loss=linear, score=lambda texture: scored.append(texture) or next(scores), steps=4)
    assert best.score == 0.7
    assert torch.equal(best.texture, scored[2])


def test_the_start_is_kept_if_no_step_does_better():
    scores = iter([0.8, 0.1, 0.7])
    best = run(loss=linear, score=lambda texture: next(scores), steps=2)
    assert best.score == 0.8
    assert (best.texture == 128 / 255).all()


def test_the_start_and_the_last_step_are_scored_too():
    assert len(last_of(steps=5, check_every=3)) == 3


def test_every_image_is_used_once_before_any_is_used_twice():
    seen = []
    run(loss=lambda t, images, labels: seen.append(images[:, 0, 0, 0]) or (t * SLOPE).sum(), steps=4)
    for epoch in (seen[:2], seen[2:]):
        assert torch.cat(epoch).sort().values.tolist() == list(range(8))
    assert not torch.equal(torch.cat(seen[:2]), torch.cat(seen[2:]))


def test_a_batch_larger_than_the_data_uses_all_of_it():
    sizes = []
    run(loss=lambda t, images, labels: sizes.append(len(images)) or (t * SLOPE).sum(), batch_size=100)
    assert sizes == [8, 8]


def test_the_network_gets_no_gradients():
    net = nn.Conv2d(3, 2, 3)
    run(loss=lambda texture, images, labels: net(texture[None]).sum())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_gradient_that_is_not_finite_stops_the_search():
    with pytest.raises(TrainingError, match="not finite after step 1"):
        run(loss=lambda texture, images, labels: (texture * torch.nan).sum())
