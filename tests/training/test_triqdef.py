"""TriQDef: its measure of similarity, its objective, and what training with it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qadtr_brevitas.config import load_recipe
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import DEFAULT_BITS, parse_precisions
from qadtr_brevitas.testing.training import check_objective, check_schedule
from qadtr_brevitas.training.loop import train
from qadtr_brevitas.training.schedules import Curriculum
from qadtr_brevitas.training.structure import edge_overlap, oriented_cosine, slopes, structural_similarity
from qadtr_brevitas.training.triqdef import TriQDef
from tests.training.support import Recorder, make_recipe

SHORT: dict[str, Any] = {"epochs": 1, "float_epochs": 0, "scheduler": {"warmup_epochs": 0}, "norm_batches": 0}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def bars(*, vertical: bool, at: int = 8) -> Tensor:
    image = torch.zeros(1, 1, 20, 20)
    image[..., at : at + 3] = 1
    return image if vertical else image.mT


def test_contracts() -> None:
    check_objective(TriQDef())
    check_objective(TriQDef(gradient=0))
    check_schedule(Curriculum())


def test_a_map_is_like_itself_whatever_its_contrast() -> None:
    maps = draw(3, 4, 12, 12)
    for other in (maps, 5 * maps, maps - 0 * maps):
        first, second = slopes(maps), slopes(other)
        assert (oriented_cosine(first, second) > 0.9999).all()
        # A soft edge overlaps itself by the sum of squares over the sum.
        assert (edge_overlap(first, second) > 0.75).all()


def test_bars_across_each_other_are_unlike() -> None:
    upright, other, lying = bars(vertical=True), bars(vertical=True, at=2), bars(vertical=False)
    same = structural_similarity(upright, upright)
    moved, turned = structural_similarity(upright, other), structural_similarity(upright, lying)
    # All edges of a bar are equally long, so that each counts half.
    assert same > 1.45
    assert turned < 0.2
    assert moved < 0.3


def test_its_gradients_of_gradients_are_those_of_finite_differences() -> None:
    # Of slopes: those of maps are scaled by their longest, which counts as a constant.
    one, other = (draw(1, 2, 4, 4, seed=seed).double().sub(0.3).requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(oriented_cosine, (one, other), atol=1e-4)
    assert torch.autograd.gradgradcheck(oriented_cosine, (one, other), atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_flat_maps_have_finite_gradients(value: float) -> None:
    maps = torch.full((2, 3, 8, 8), value, requires_grad=True)
    loss = structural_similarity(maps, draw(2, 3, 8, 8))
    (gradient,) = torch.autograd.grad(loss, maps, create_graph=True)
    gradient.square().sum().backward()
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert maps.grad is not None
    assert maps.grad.isfinite().all()


def test_what_has_no_edges_is_refused() -> None:
    with pytest.raises(UsageError, match=r"\(2, 16\).*maps"):
        structural_similarity(torch.rand(2, 16), torch.rand(2, 16))
    with pytest.raises(UsageError, match=r"\(2, 16, 2, 2\).*3x3"):
        structural_similarity(torch.rand(2, 16, 2, 2), torch.rand(2, 16, 2, 2))


@pytest.mark.parametrize(("epochs", "entered"), [(8, [2, 2, 3, 4, 5, 5, 5, 5]), (1, [5]), (2, [2, 5])])
def test_precisions_enter_one_after_the_other(epochs: int, entered: list[int]) -> None:
    schedule, choices = Curriculum(), parse_precisions(DEFAULT_BITS)
    found = [schedule.active(epoch=epoch, epochs=epochs) for epoch in range(epochs)]
    assert found == [choices[:count] for count in entered]
    drawn = {schedule.precisions(step, seed=0, epoch=0, epochs=epochs) for step in range(60)}
    assert drawn == {(precision,) for precision in choices[: entered[0]]}


@pytest.mark.slow
def test_training_makes_two_precisions_unlike(tmp_path: Path) -> None:
    def similarities(run: str, **factors: float) -> dict[str, float]:
        recorder = Recorder()
        objective = {"name": "triqdef", "layers": ["act1", "act2"], **factors}
        keys = {**SHORT, "attack": None, "gradient": None, "regularizers": [], "objective": objective}
        train(
            make_recipe(**{**keys, "epochs": 3, "optimizer": {"lr": 0.02}}),
            tmp_path / run,
            device="cpu",
            observer=recorder,
        )
        return recorder.epochs[-1].means

    plain = similarities("plain", feature=0.0, gradient=1e-9)
    trained = similarities("trained", feature=4.0, gradient=4.0)
    assert trained["feature_similarity"] < plain["feature_similarity"] - 0.05
    assert trained["gradient_similarity"] < plain["gradient_similarity"]


@pytest.mark.slow
def test_the_defense_trains_on_digits(tmp_path: Path) -> None:
    recorder = Recorder()
    recipe = load_recipe("digits_smoke+triqdef")
    train(recipe, tmp_path / "run", device="cpu", observer=recorder)
    assert all({"feature_similarity", "gradient_similarity"} <= record.metrics.keys() for record in recorder.steps)
