from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import Precision, parse_precisions
from qadtr_brevitas.core.seeding import generator
from qadtr_brevitas.quant import SwitchableModel, at_precision, frozen_weights, get_precision
from qadtr_brevitas.quant.inference import (
    InferenceMode,
    check_differentiable,
    logits_at,
    mode_name,
    parse_mode,
    parse_modes,
    sorted_modes,
)
from qadtr_brevitas.quant.switch import Switch
from tests.evaluation.fakes import Reader
from tests.evaluation.models import make_switchable


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("4", "4"),
        (4, "4"),
        ("2+8+4", "8+4+2"),
        ("w4a8+2", "w4a8+2"),
        ("4 + 4", "4"),
        ((4, 8), "w4a8"),
        ("random(2,8+4)", "random(8+4+2)"),
        ("vote( 8, w4a8 )", "vote(8+w4a8)"),
        ("random(4)", "4"),
    ],
)
def test_a_mode_is_parsed_and_named(given: int | str | tuple[int, int], name: str) -> None:
    mode = parse_mode(given)
    assert mode_name(mode) == name
    assert parse_mode(name) == parse_mode(mode) == mode


@pytest.mark.parametrize("given", ["", "8+", "8+one", "+", "8+1", "8,4", "random()", "vote(8+4", "mean(8+4)"])
def test_a_malformed_mode_is_refused(given: str) -> None:
    with pytest.raises(UsageError, match=r"is not a precision|not possible"):
        parse_mode(given)


def test_several_modes_are_parsed_from_one_text() -> None:
    found = parse_modes("8, random(8,4),vote(8+4+2),8,4+2")
    assert list(map(str, found)) == ["8", "random(8+4)", "vote(8+4+2)", "4+2"]


def test_aggregates_are_sorted_after_single_precisions() -> None:
    given = ["random(8+4)", "8+4", "2", "vote(8+4)", "32+2", "w8a4", "32"]
    assert sorted_modes(given) == ["32", "w8a4", "2", "32+2", "8+4", "random(8+4)", "vote(8+4)"]


def test_mean_is_of_the_logits_and_restores_the_precision() -> None:
    model = make_switchable()
    images = torch.rand(3, 3, 16, 16, requires_grad=True)
    with frozen_weights(model):
        single = []
        for bits in (32, 4):
            with at_precision(model, bits):
                single.append(model(images))
        before = get_precision(model)
        mean = logits_at(model, parse_mode("32+4"))(images)
        assert get_precision(model) == before
        assert torch.equal(logits_at(model, (Precision(4, 4),))(images), single[1])
    assert torch.allclose(mean, (single[0] + single[1]) / 2)
    (gradient,) = torch.autograd.grad(mean.sum(), images)
    expected = sum(torch.autograd.grad(logits.sum() / 2, images)[0] for logits in single)
    assert torch.allclose(gradient, expected, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


def at_each(model: SwitchableModel, images: Tensor, bits: Sequence[int]) -> list[Tensor]:
    found = []
    for precision in bits:
        with at_precision(model, precision):
            found.append(model(images))
    return found


def test_random_precision_is_drawn_for_each_image_and_repeats_with_its_stream() -> None:
    model, images = make_switchable(), torch.rand(60, 3, 16, 16)
    with frozen_weights(model):
        single = torch.stack(at_each(model, images, (32, 4)))
        runs = [logits_at(model, parse_mode("random(32+4)"), draws=generator(seed, "x"))(images) for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    # The size of a batch may change the last bits of a sum.
    distance = (runs[0] - single).abs().amax(dim=2)
    assert distance.amin(dim=0).max() < 1e-4
    assert 15 <= int(distance.argmin(dim=0).sum()) <= 45


class Answers(nn.Module):
    """Predicts, for every image, the class that is set for the current precision."""

    def __init__(self, **classes: int) -> None:
        super().__init__()
        self.classes = {int(name[1:]): number for name, number in classes.items()}
        self.switch = Switch(parse_precisions(self.classes))

    def forward(self, images: Tensor) -> Tensor:
        number = self.classes[self.switch.precision.weight]
        return one_hot(torch.full((len(images),), number), 5).float()


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        ({"w8": 3, "w4": 1, "w2": 1}, 1),
        ({"w8": 3, "w4": 1, "w2": 0}, 3),
        ({"w16": 0, "w8": 3, "w5": 3, "w4": 1, "w2": 1}, 3),
        ({"w16": 2, "w8": 3, "w4": 2, "w2": 3}, 2),
    ],
)
def test_vote_goes_to_most_precisions_and_ties_to_those_of_more_bits(answers: dict[str, int], winner: int) -> None:
    model = Answers(**answers)
    mode = InferenceMode(model.switch.allowed, "vote")
    assert logits_at(model, mode)(torch.zeros(2, 3, 4, 4)).argmax(dim=1).tolist() == [winner] * 2


def test_vote_has_no_gradient_to_follow() -> None:
    with pytest.raises(UsageError, match=r"vote\(8\+4\).*no gradient.*mean.*8\+4"):
        check_differentiable(parse_mode("vote(8+4)"))
    check_differentiable(parse_mode("random(8+4)"))


def test_precision_the_model_lacks_is_refused_at_once() -> None:
    with pytest.raises(UsageError, match=r"precision 5.*8, 4"):
        logits_at(Reader(), parse_mode("8+5"))
