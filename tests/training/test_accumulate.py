"""A batch computed in parts: the same gradients as at once, of a network without BatchNorm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models import register_model
from torch import Tensor, nn

from qadtr_brevitas.config import Recipe
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.training.images import ImageBatch
from qadtr_brevitas.training.log import mean_metrics
from qadtr_brevitas.training.loop import train
from tests.training.support import Recorder, make_recipe, weights


class NormFree(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.act1 = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.conv2, self.act2 = nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()
        self.linear = nn.Linear(16 * 16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.act2(self.conv2(self.act1(self.conv1(x)))).flatten(1))


@register_model
def train_norm_free(pretrained: bool = False, num_classes: int = 3, **kwargs: Any) -> NormFree:
    return NormFree(num_classes)


def recipe_of(accumulate: int, **keys: Any) -> Recipe:
    plain = {"attack": None, "gradient": None, "norm_batches": 0, "epochs": 1, **keys}
    recipe = make_recipe(accumulate=accumulate, **plain).model_dump()
    return Recipe.model_validate({**recipe, "model": {"name": "train_norm_free"}})


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["uniform", "sandwich"])
def test_parts_together_train_as_the_large_batch(schedule: str, tmp_path: Path) -> None:
    precision = {"schedule": schedule, "choices": [32, 4, 2]}
    teacher = [{"name": "distillation", "teacher": "chain" if schedule == "sandwich" else "float"}]
    ran: list[dict[str, Tensor]] = []
    losses: list[list[float]] = []
    for count in (1, 4):
        recorder = Recorder()
        recipe = recipe_of(count, precision=precision, regularizers=teacher)
        ran.append(weights(train(recipe, tmp_path / str(count), device="cpu", observer=recorder)))
        losses.append([record.loss for record in recorder.steps])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert all(torch.allclose(ran[0][name], ran[1][name], rtol=1e-3, atol=1e-4) for name in ran[0])


@pytest.mark.slow
def test_attacks_and_rules_run_on_the_parts(tmp_path: Path) -> None:
    recorder = Recorder()
    train(make_recipe(accumulate=2, epochs=1, float_epochs=0), tmp_path, device="cpu", observer=recorder)
    assert "adversarial_accuracy" in recorder.steps[0].metrics


def test_every_part_has_its_share_of_the_attacked_images() -> None:
    batch = ImageBatch(torch.arange(8.0)[:, None, None, None], torch.arange(8), torch.eye(8))
    first, second = batch.parts(2)
    assert first.labels.tolist() == [0, 2, 4, 6]
    assert second.images.flatten().tolist() == [1, 3, 5, 7]
    assert first.targets is not None
    assert torch.equal(first.targets.argmax(dim=1), first.labels)
    assert batch.parts(1) == [batch]


def test_metrics_are_means_over_the_parts_that_have_them() -> None:
    assert mean_metrics([{"a": 1.0, "b": 4.0}, {"a": torch.tensor(3.0)}]) == {"a": 2.0, "b": 4.0}


@pytest.mark.parametrize("count", [3, 32])
def test_a_number_of_parts_that_does_not_divide_the_batch(count: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"accumulate={count} does not divide the 16 images"):
        train(recipe_of(count), tmp_path, device="cpu")
