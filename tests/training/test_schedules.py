from collections import Counter
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from qadtr_brevitas.core.precision import Precision, parse_precisions
from qadtr_brevitas.core.registry import SCHEDULES
from qadtr_brevitas.training.schedules import Cycle, Fixed, Sandwich, Schedule, Uniform, Weighted

BITS = (32, 8, 5, 4, 2)


def read(plugin: type, **fields: Any) -> Any:
    """A plug-in from recipe values."""
    return TypeAdapter(plugin).validate_python(fields)


def draws(schedule: Schedule, steps: int, *, seed: int = 0, epoch: int = 0, epochs: int = 10) -> list[tuple[str, ...]]:
    drawn = (schedule.precisions(step, seed=seed, epoch=epoch, epochs=epochs) for step in range(steps))
    return [tuple(str(precision) for precision in precisions) for precisions in drawn]


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_draws_depend_on_seed_and_step_only(name: str) -> None:
    schedule = SCHEDULES.load(name)()
    assert draws(schedule, 200) == draws(schedule, 200)
    possible = set(schedule.possible())
    assert possible <= set(parse_precisions(BITS))
    for step in (0, 7, 10**9):
        once = schedule.precisions(step, seed=3, epoch=2, epochs=10)
        assert once == schedule.precisions(step, seed=3, epoch=2, epochs=10)
        assert set(once) <= possible


@pytest.mark.parametrize("name", ["uniform", "weighted", "sandwich"])
def test_other_seeds_draw_otherwise(name: str) -> None:
    schedule = SCHEDULES.load(name)()
    assert draws(schedule, 50, seed=0) != draws(schedule, 50, seed=1)


def test_uniform_draws_all_choices_equally() -> None:
    counts = Counter(draws(Uniform(), 5000))
    assert set(counts) == {(str(bits),) for bits in BITS}
    # Five standard deviations of a binomial with p = 1/5.
    assert all(abs(count - 1000) < 5 * (5000 * 0.2 * 0.8) ** 0.5 for count in counts.values())


def test_independent_draws_weights_and_activations_apart() -> None:
    schedule = read(Uniform, choices=[8, 4, 2], independent=True)
    counts = Counter(schedule.precisions(step, seed=0, epoch=0, epochs=1)[0] for step in range(4500))
    assert set(counts) == set(schedule.possible())
    assert len(counts) == 9
    assert all(abs(count - 500) < 5 * (4500 / 9 * 8 / 9) ** 0.5 for count in counts.values())


def test_mixed_precisions_are_drawn_whole() -> None:
    schedule = read(Uniform, choices=[8, 4, "mixed:edge"], independent=True)
    seen = {str(schedule.precisions(step, seed=0, epoch=0, epochs=1)[0]) for step in range(200)}
    assert seen == {"8", "4", "w8a4", "w4a8", "mixed:edge"} == {str(precision) for precision in schedule.possible()}
    sandwich = read(Sandwich, choices=["mixed:edge", 32, 4])
    assert [str(p) for p in sandwich.precisions(0, seed=0, epoch=0, epochs=1)] == ["32", "mixed:edge", "4"]


def test_fixed_never_changes() -> None:
    assert set(draws(read(Fixed, choice="w4a8"), 20)) == {("w4a8",)}


def test_cycle_divides_the_epochs() -> None:
    turns = [draws(Cycle(), 1, epoch=epoch, epochs=10)[0][0] for epoch in range(10)]
    assert turns == ["32", "32", "8", "8", "5", "5", "4", "4", "2", "2"]
    few = [draws(Cycle(), 1, epoch=epoch, epochs=3)[0][0] for epoch in range(3)]
    assert few == ["32", "8", "4"]


def test_cycle_with_a_length_starts_over() -> None:
    schedule = read(Cycle, choices=[8, 2], epochs_each=2)
    assert [draws(schedule, 1, epoch=epoch)[0][0] for epoch in range(6)] == ["8", "8", "2", "2", "8", "8"]


def test_weighted_follows_its_weights() -> None:
    counts = Counter(draws(read(Weighted, choices=[8, 4, 2], weights=[1, 0, 3]), 4000))
    assert set(counts) == {("8",), ("2",)}
    assert counts["2",] == pytest.approx(3000, abs=5 * (4000 * 0.25 * 0.75) ** 0.5)


def test_sandwich_has_highest_random_and_lowest() -> None:
    seen = draws(read(Sandwich, choices=[2, 32, 5, 4, 8]), 200)
    assert {(first, last) for first, _, last in seen} == {("32", "2")}
    assert {middle for _, middle, _ in seen} == {"8", "5", "4"}
    assert set(draws(read(Sandwich, choices=[4, 2]), 5)) == {("4", "2")}
    assert set(draws(read(Sandwich, choices=[4]), 5)) == {("4",)}


@pytest.mark.parametrize(
    ("plugin", "fields", "message"),
    [
        (Uniform, {"choices": []}, "at least 1 item"),
        (Uniform, {"choices": [64]}, "is not possible"),
        (Fixed, {"choice": "four"}, "is not a precision"),
        (Weighted, {"choices": [8, 4], "weights": [1]}, "1 weights for 2 choices"),
        (Weighted, {"choices": [8], "weights": [0]}, "all weights are 0"),
        (Cycle, {"epochs_each": 0}, "greater than or equal to 1"),
    ],
)
def test_wrong_values_are_refused(plugin: type, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        read(plugin, **fields)


def test_possible_names_every_pair() -> None:
    assert set(read(Uniform, choices=[8, 4], independent=True).possible()) == {
        Precision(weight, act) for weight in (8, 4) for act in (8, 4)
    }
