"""A tiny network that timm can make by name, a recipe that trains it in a second, and a training run to kill."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from timm.models import register_model
from torch import Tensor, nn

from qadtr_brevitas.config import Recipe
from qadtr_brevitas.pipeline.build import build_switchable
from qadtr_brevitas.pipeline.calibration import calibrate_on
from qadtr_brevitas.quant import SwitchableModel
from qadtr_brevitas.training.log import EpochRecord, StepRecord, TrainingObserver
from qadtr_brevitas.training.loop import train


class TinyNet(nn.Module):
    """Two convolutions with BatchNorm, dropout and a linear layer.

    Args:
        num_classes: number of logits.
        drop: share of the features that dropout drops.
    """

    pretrained_cfg: ClassVar = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "architecture": "train_tiny_net"}

    def __init__(self, num_classes: int = 3, drop: float = 0.1) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.bn2, self.act2 = nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        self.drop = nn.Dropout(drop)
        self.linear = nn.Linear(16 * 16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        return self.linear(self.drop(x.flatten(1)))


@register_model
def train_tiny_net(pretrained: bool = False, num_classes: int = 3, drop: float = 0.1, **kwargs: Any) -> TinyNet:
    return TinyNet(num_classes, drop)


def make_recipe(*, augment: str = "crop-flip", val_share: float = 0.0, drop: float = 0.1, **train_keys: Any) -> Recipe:
    """A recipe for three shapes of 8x8 pixels, 96 images, 6 steps an epoch, with everything a run can have.

    Other networks can take the place of its own as long as `drop`, which is an argument of that, is left alone.
    """
    keys: dict[str, Any] = {
        "epochs": 3,
        "float_epochs": 1,
        "batch_size": 16,
        "optimizer": {"lr": 0.05},
        "scheduler": {"warmup_epochs": 0.5},
        "precision": {"schedule": "uniform", "choices": [32, 4, 2]},
        "attack": {"name": "a-qapa", "steps": 1, "sizes": [3], "universal": 0.5},
        "regularizers": ["distillation"],
        "gradient": "gir",
        "checkpoint_every": 4,
        "norm_batches": 2,
    }
    data = {"name": "shapes", "image_size": 8, "classes": 3, "train_images": 96, "test_images": 30}
    return Recipe.model_validate(
        {
            "model": {"name": "train_tiny_net", "args": {} if drop == 0.1 else {"drop": drop}},
            "data": {"dataset": data, "augment": augment, "val_share": val_share},
            "quant": {"precisions": [32, 4, 2], "calibration": {"samples": 32}},
            "train": {**keys, **train_keys},
        }
    )


def calibrated_model() -> SwitchableModel:
    """The network of the recipe, calibrated on its images."""
    torch.manual_seed(0)
    recipe = make_recipe()
    split = recipe.data.dataset.load("train")
    model, _ = build_switchable(recipe, split)
    calibrate_on(model, split, recipe.quant.calibration, seed=0)
    return model


class Recorder(TrainingObserver):
    """Keeps all records and messages."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.epochs: list[EpochRecord] = []
        self.messages: list[str] = []

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def on_epoch(self, record: EpochRecord) -> None:
        self.epochs.append(record)

    def on_message(self, message: str) -> None:
        self.messages.append(message)


class StopAt(Recorder):
    """Calls a function after a step."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        super().__init__()
        self.at, self.act = step, act

    def on_step(self, record: StepRecord) -> None:
        super().on_step(record)
        if record.step == self.at:
            self.act()


class Boom(Exception):
    pass


def explode() -> None:
    raise Boom


class Slow(TrainingObserver):
    """Waits after every step, so that a run can be killed several times on any machine."""

    def on_step(self, record: StepRecord) -> None:
        time.sleep(0.05)


def train_to_be_killed(run: Path) -> None:
    """A training run for a process of its own."""
    torch.set_num_threads(1)
    train(make_recipe(), run, device="cpu", observer=Slow())


def weights(run: Path, folder: str = "last") -> dict[str, Tensor]:
    """The weights of a finished run."""
    return load_file(run / folder / "model.safetensors")


def same_weights(one: Path, other: Path, folder: str = "last") -> bool:
    """Whether two runs ended with the same weights, bit for bit."""
    first, second = weights(one, folder), weights(other, folder)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
