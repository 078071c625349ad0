"""Masked training: the shares, where masks come from, that the search finds the worst ones, and that runs repeat."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qadtr_brevitas.config import MasksSection, load_recipe
from qadtr_brevitas.config.load import make_recipe as checked_recipe
from qadtr_brevitas.core.errors import RecipeError, UsageError
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.core.seeding import generator
from qadtr_brevitas.evaluation.mask_fill import MaskFill
from qadtr_brevitas.evaluation.masks import covering_masks
from qadtr_brevitas.quant import get_precision, set_precision
from qadtr_brevitas.training.images import ImageSource
from qadtr_brevitas.training.inputs import TrainingInputs
from qadtr_brevitas.training.loop import train
from qadtr_brevitas.training.masks import MaskPlan, TrainingMasks
from qadtr_brevitas.training.step import AdversarialBatch
from tests.training.support import Recorder, calibrated_model, make_recipe, same_weights

SIDE = 8
CPU = torch.device("cpu")
MEAN = (0.25, 0.5, 0.75)
FOUR = Precision(4, 4)


def make_masks(**keys: Any) -> TrainingMasks:
    return TrainingMasks(
        MasksSection.model_validate({"patches": [2], "per_side": 3, **keys}), (SIDE, SIDE), mean=MEAN, device=CPU
    )


def make_plan(counts: list[int], *, searched: bool = False) -> MaskPlan:
    return MaskPlan(torch.tensor(counts), torch.full((len(counts),), searched))


def brightness_model(weights: Tensor) -> Any:
    """Logits (0, weighted brightness): the label 0 loses by what masks leave to be seen."""

    def model(images: Tensor) -> Tensor:
        seen = (images.mean(dim=1) * weights).flatten(1).sum(dim=1)
        return torch.stack([torch.zeros_like(seen), seen], dim=1)

    return model


def never(images: Tensor) -> Tensor:
    raise AssertionError("random masks need no model")


def covered(images: Tensor) -> Tensor:
    """Which pixels of the masked versions of white images are covered."""
    return (images != 1).any(dim=1)


@pytest.mark.parametrize("mode", ["random", "greedy"])
def test_masks_are_those_of_certification_and_show_the_mean(mode: str) -> None:
    masks = make_masks(mode=mode, patches=[2, "1x4"])
    allowed = torch.cat([covering_masks((SIDE, SIDE), size, per_side=3) for size in (2, (1, 4))])
    images, counts = torch.ones(60, 3, SIDE, SIDE), [0] * 20 + [1] * 20 + [2] * 20
    model = brightness_model(torch.randn(SIDE, SIDE, generator=generator(0, "weights")))
    plan = make_plan(counts, searched=mode == "greedy")
    result = masks.apply(model, images, torch.zeros(60).long(), plan, generator=generator(1, "x"))
    one = {mask.flatten().int().numpy().tobytes() for mask in allowed}
    two = {(first | second).flatten().int().numpy().tobytes() for first, second in product(allowed, repeat=2)}
    seen = [mask.flatten().int().numpy().tobytes() for mask in covered(result)]
    assert not covered(result[:20]).any()
    assert set(seen[20:40]) <= one
    assert set(seen[40:]) <= two
    assert len(set(seen)) > 3
    hidden = result.permute(0, 2, 3, 1)[covered(result)]
    assert torch.equal(hidden, torch.tensor(MEAN).expand_as(hidden))


def test_random_masks_ask_no_model_and_reach_every_mask() -> None:
    images = torch.ones(400, 3, SIDE, SIDE)
    result = make_masks().apply(never, images, torch.zeros(400).long(), make_plan([1] * 400), generator=generator(0))
    every = covering_masks((SIDE, SIDE), 2, per_side=3)
    assert {tuple(mask.flatten().tolist()) for mask in covered(result)} == {tuple(m.flatten().tolist()) for m in every}


def test_two_random_masks_differ() -> None:
    images = torch.ones(200, 3, SIDE, SIDE)
    result = make_masks().apply(never, images, torch.zeros(200).long(), make_plan([2] * 200), generator=generator(0))
    single = covering_masks((SIDE, SIDE), 2, per_side=3)[0].sum()
    assert bool((covered(result).flatten(1).sum(dim=1) > single).all())


def test_masks_show_what_certification_shows() -> None:
    images = torch.randint(256, (40, 3, SIDE, SIDE), generator=generator(0, "images")) / 255
    plan, labels = make_plan([1, 2] * 20), torch.zeros(40).long()
    mean = make_masks().apply(never, images, labels, plan, generator=generator(0))
    filled = make_masks(fill="interpolate").apply(never, images, labels, plan, generator=generator(0))
    # No pixel of 8 bit has the mean color.
    hidden = (mean == torch.tensor(MEAN).view(-1, 1, 1)).all(dim=1, keepdim=True)
    expected = MaskFill(torch.tensor(MEAN).view(-1, 1, 1), "interpolate").cover(images, hidden)
    assert torch.equal(filled, expected)


def test_the_search_finds_the_worst_mask_and_the_worst_beside_it() -> None:
    # With as many blocks as masks, every mask is a candidate.
    masks, every = make_masks(mode="greedy", grid=3), covering_masks((SIDE, SIDE), 2, per_side=3)
    images = torch.rand(6, 3, SIDE, SIDE, generator=generator(0, "images"))
    labels, fill = torch.tensor([0, 1, 0, 1, 0, 1]), torch.tensor(MEAN).view(-1, 1, 1)
    model = brightness_model(torch.randn(SIDE, SIDE, generator=generator(0, "weights")))

    def loss(image: Tensor, label: Tensor, mask: Tensor) -> float:
        return float(cross_entropy(model(torch.where(mask, fill, image)[None]), label[None]))

    result = masks.apply(model, images, labels, make_plan([1, 1, 1, 2, 2, 2], searched=True), generator=generator(1))
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        first = max(every, key=lambda mask: loss(image, label, mask))
        second = max(every, key=lambda mask: loss(image, label, first | mask))
        expected = torch.where(first if number < 3 else first | second, fill, image)
        assert torch.equal(result[number], expected)


def test_a_coarse_grid_costs_its_candidates_and_is_worse_than_chance() -> None:
    asked: list[int] = []
    weights = torch.rand(SIDE, SIDE, generator=generator(0, "weights")) / 20

    def model(images: Tensor) -> Tensor:
        asked.append(len(images))
        return brightness_model(weights)(images)

    images, labels = torch.ones(100, 3, SIDE, SIDE), torch.ones(100).long()
    plan = make_plan([1] * 30 + [2] * 70, searched=True)
    greedy = make_masks(mode="greedy", grid=2).apply(model, images, labels, plan, generator=generator(0))
    assert sum(asked) == 4 * 100 + 4 * 70
    chance = make_masks().apply(never, images, labels, make_plan([1] * 30 + [2] * 70), generator=generator(0))
    losses = [cross_entropy(brightness_model(weights)(seen), labels) for seen in (greedy, chance)]
    assert losses[0] > losses[1]


def test_the_cost_of_a_recipe_is_what_the_search_asks_for() -> None:
    section = MasksSection(mode="greedy", one=0.5, two=0.25, attacked=0.5, searched=0.5, grid=2)
    masks = TrainingMasks(section, (32, 32), mean=MEAN, device=CPU)
    asked: list[int] = []

    def model(images: Tensor) -> Tensor:
        asked.append(len(images))
        return images.mean(dim=(2, 3))

    for seed in range(30):
        plan = masks.plan(64, 32, generator=generator(seed))
        masks.apply(model, torch.rand(64, 3, 32, 32), torch.zeros(64).long(), plan, generator=generator(seed))
    assert sum(asked) / 30 / 64 == pytest.approx(section.search_passes(attacked=0.5), rel=0.05)
    assert MasksSection().search_passes(attacked=0.5) == 0
    cost = load_recipe("cifar10_resnet20_masked", ["train.masks.mode=greedy"]).train.mask_search_cost
    assert cost is not None
    # A quarter of (0.3 * 9 + 0.7 * 18).
    assert " 3.8 forward passes" in cost
    assert load_recipe("cifar10_resnet20_masked").train.mask_search_cost is None


@pytest.mark.parametrize("attacked", [0, 10, 20])
def test_shares_are_exact_in_both_parts_of_a_batch(attacked: int) -> None:
    masks = make_masks(mode="greedy", one=0.4, two=0.2, attacked=0.5, searched=0.5)
    plan = masks.plan(20, attacked, generator=generator(0))
    for part, factor in ((plan.counts[:attacked], 0.5), (plan.counts[attacked:], 1.0)):
        assert int((part == 1).sum()) == round(0.4 * factor * len(part))
        assert int((part == 2).sum()) == round(0.2 * factor * len(part))
    assert int(plan.searched.sum()) == round(0.5 * int((plan.counts > 0).sum()))
    assert not plan.searched[plan.counts == 0].any()
    assert not torch.equal(plan.counts, masks.plan(20, attacked, generator=generator(1)).counts)


def test_processes_together_mask_what_one_would() -> None:
    plan = make_masks(mode="greedy").plan(16, 8, generator=generator(0))
    shares = [plan.share(rank, 2) for rank in range(2)]
    assert torch.stack([share.counts for share in shares], dim=1).flatten().equal(plan.counts)
    assert torch.stack([share.searched for share in shares], dim=1).flatten().equal(plan.searched)


def inputs_of(**keys: Any) -> TrainingInputs:
    recipe = make_recipe(augment="none", masks={"patches": [2], "per_side": 3, **keys})
    masks = TrainingMasks.of(recipe, (SIDE, SIDE), mean=MEAN, device=CPU)
    return TrainingInputs(recipe, 0, 1, masks)


def test_masks_lie_over_attacked_images_and_are_searched_at_the_precision_of_the_step() -> None:
    source, model = inputs_of(mode="greedy", one=0.25, two=0.25), calibrated_model().train()
    images, labels, _ = ImageSource(source.recipe, source.recipe.data.dataset.load("train")).batch(0)
    set_precision(model, FOUR)
    asked: list[tuple[Precision, bool]] = []
    # In float, to find what is folded.
    source.mask(model, AdversarialBatch(images, 8), labels, step=4, precision=FOUR)
    model.register_forward_pre_hook(lambda net, _: asked.append((get_precision(model), net.training)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = AdversarialBatch(images.flip(2), 8)
    found = source.mask(model, batch, labels, step=5, precision=FOUR)
    assert set(asked) == {(FOUR, False)}
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert found.masked is not None
    assert (found.attacked, int(found.masked[:8].sum()), int(found.masked[8:].sum())) == (8, 4, 4)
    hidden = (found.images != batch.images).any(dim=1)
    assert torch.equal(hidden.flatten(1).any(dim=1), found.masked)
    again = source.mask(model, batch, labels, step=5, precision=FOUR)
    assert torch.equal(again.images, found.images)
    other = source.mask(model, batch, labels, step=6, precision=FOUR)
    assert not torch.equal(other.images, found.images)


def test_without_masks_a_batch_stays_as_it_is() -> None:
    recipe = make_recipe()
    source = TrainingInputs(recipe, 0, 1)
    batch = AdversarialBatch(torch.rand(16, 3, SIDE, SIDE), 4)
    assert source.mask(calibrated_model(), batch, torch.zeros(16).long(), step=0, precision=FOUR) is batch


class Boom(Exception):
    pass


class StopAt(Recorder):
    def on_step(self, record: Any) -> None:
        super().on_step(record)
        if record.step == 9:
            raise Boom


@pytest.mark.slow
def test_a_run_with_masks_and_patches_resumes_bit_for_bit(tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "epochs": 2,
        "masks": {"mode": "greedy", "patches": [2], "per_side": 3, "grid": 2, "one": 0.4, "two": 0.4},
    }
    recorder = Recorder()
    whole = train(make_recipe(**keys), tmp_path / "whole", device="cpu", observer=recorder)
    with pytest.raises(Boom):
        train(make_recipe(**keys), tmp_path / "parts", device="cpu", observer=StopAt())
    assert same_weights(whole, train(make_recipe(**keys), tmp_path / "parts", device="cpu"))
    assert any("forward passes" in message for message in recorder.messages)
    quantized = [record for record in recorder.steps if record.phase == "quantized"]
    assert all({"accuracy", "adversarial_accuracy", "masked_accuracy"} <= record.metrics.keys() for record in quantized)
    # The float epochs before calibration have no masks.
    assert all("masked_accuracy" not in record.metrics for record in recorder.steps if record.phase == "float")


def problem(**keys: Any) -> str:
    with pytest.raises(RecipeError) as error:
        checked_recipe({"train": {"masks": keys}}, source="test")
    return str(error.value)


def test_shares_that_leave_no_room_and_other_wrong_values_are_refused() -> None:
    assert "0.7 + 0.5 = 1.2" in problem(one=0.7, two=0.5)
    assert "train.masks=null" in problem(one=0, two=0)
    assert "train.masks.patches.0" in problem(patches=["5y"])
    assert "random" in problem(mode="worst")
    assert "train.masks.searched" in problem(searched=0)
    assert "did you mean 'patches'" in problem(patchs=[5])


@pytest.mark.parametrize(
    ("keys", "facts"), [({"patches": [9]}, "9x9.*8x8"), ({"patches": ["2", "8"]}, "8x8.*per_side")]
)
def test_masks_that_do_not_fit_or_hide_everything_are_refused_before_training(
    keys: dict[str, Any], facts: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=facts):
        train(make_recipe(masks=keys), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
