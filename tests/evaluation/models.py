"""A tiny model directory of the procedural shapes, for tests of whole commands."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qadtr_brevitas.data.shapes import SHAPES, Shapes
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.models.create import create_float_model
from qadtr_brevitas.pipeline.checkpoint import save_model
from qadtr_brevitas.quant import SwitchableModel, calibrate, convert
from qadtr_brevitas.quant.model_info import ModelInfo

SIDE = 16
CLASSES = 3
PIXELS = (0.5, 0.5, 0.5)
DATASET = "{name: shapes, image_size: 16, classes: 3, train_images: 60, test_images: 30}"


def make_model_dir(path: Path, *, precisions: tuple[int, ...] = (32, 4), name: int = 0, recipe: bool = True) -> Path:
    """A switchable network, alike but for its `name`; with a run's recipe unless told otherwise."""
    info = ModelInfo(
        name="cifar_resnet8",
        args={},
        num_classes=CLASSES,
        image_size=(SIDE, SIDE),
        classes=SHAPES[:CLASSES],
        mean=PIXELS,
        std=PIXELS,
        quant={"precisions": list(precisions)},
    )
    model = make_switchable(precisions=precisions, name=name)
    save_model(path / "last" if recipe else path, model, info)
    if recipe:
        (path / "recipe.yaml").write_text(f"data:\n  dataset: {DATASET}\n")
    return path


def make_switchable(*, precisions: tuple[int, ...] = (32, 4), name: int = 0) -> SwitchableModel:
    """The network of `make_model_dir`, in eval mode."""
    net = create_float_model("cifar_resnet8", num_classes=CLASSES, args={}).eval()
    net.load_state_dict(_weights(name))
    model = convert(net, precisions, mean=PIXELS, std=PIXELS, image_size=(SIDE, SIDE))
    calibrate(model, [train_split().batch(torch.arange(30))[0]])
    return model.eval()


def train_split() -> Split:
    """The training images of DATASET."""
    return Shapes(image_size=SIDE, classes=CLASSES, train_images=60).load("train")


@cache
def _weights(seed: int) -> dict[str, Tensor]:
    """Weights of a few steps, with which the network knows some of its training images."""
    torch.manual_seed(seed)
    net = create_float_model("cifar_resnet8", num_classes=CLASSES, args={})
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    images, labels = train_split().batch(torch.arange(60))
    for _ in range(20):
        loss = cross_entropy(net((images - PIXELS[0]) / PIXELS[0]), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.state_dict()
