"""From recipe sections to objects: data, float model, switchable model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from qadtr_brevitas.checkpoint import ModelInfo
from qadtr_brevitas.data.split import Progress, Split
from qadtr_brevitas.errors import DataError
from qadtr_brevitas.models.create import create_float_model, fixed_size_args
from qadtr_brevitas.quant import ConversionReport, SwitchableModel, calibrate, convert
from qadtr_brevitas.recipe import CalibrationSection, DataSection, ModelSection, Recipe
from qadtr_brevitas.weights import load_into, load_weights

CALIBRATION_BATCH = 128


class Splits(NamedTuple):
    """The images of a run: for training, for choosing the best model (or None), and for testing."""

    train: Split
    val: Split | None
    test: Split


def build_split(
    section: DataSection, split: Literal["train", "test"], *, seed: int, progress: Progress | None = None
) -> Split:
    """Loads one split, limited as the section says.

    Raises:
        DataError: the data are missing or damaged.
    """
    images: Split = section.dataset.load(split, progress=progress)
    limit = section.train_limit if split == "train" else section.test_limit
    return images if limit is None or limit >= len(images) else images.balanced(limit, seed=seed)


def build_splits(section: DataSection, *, seed: int, progress: Progress | None = None) -> Splits:
    """Loads the data, and holds out `val_share` of the training images.

    Raises:
        DataError: the data are missing or damaged.
    """
    train = build_split(section, "train", seed=seed, progress=progress)
    test = build_split(section, "test", seed=seed, progress=progress)
    if not section.val_share:
        return Splits(train, None, test)
    val, train = train.divide(max(1, round(section.val_share * len(train))), seed=seed)
    return Splits(train, val, test)


def build_model(section: ModelSection, *, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    """Makes the float network, with weights if the section names any.

    Args:
        section: what to make.
        num_classes: outputs.
        image_size: height and width of the images, in pixels.

    Raises:
        UsageError: the name or an argument is unknown.
        CheckpointError: the weights cannot be read, or are those of another network or number of classes.
    """
    args = {**fixed_size_args(section.name, image_size), **section.args}
    model = create_float_model(section.name, pretrained=section.pretrained, num_classes=num_classes, args=args)
    if section.checkpoint is not None:
        load_into(model, load_weights(section.checkpoint), source=section.checkpoint, name=section.name)
    return model


def build_switchable(recipe: Recipe, train: Split) -> tuple[SwitchableModel, ConversionReport, ModelInfo]:
    """Makes the float network for the images and converts it; it is not yet calibrated.

    Args:
        recipe: its sections `model` and `quant` are read.
        train: the training images, for their size and classes.

    Returns:
        The switchable model, what was done to each layer, and what `save_model` needs.

    Raises:
        DataError: the data have another number of classes than `model.num_classes`.
        UsageError, CheckpointError: as `build_model` and `convert`.
    """
    num_classes = recipe.model.num_classes or len(train.classes)
    check_classes(num_classes, train)
    net = build_model(recipe.model, num_classes=num_classes, image_size=train.image_size)
    config = resolve_data_config({}, model=net)
    quant = recipe.quant.model_dump(mode="json", exclude={"calibration"})
    mean, std = tuple(config["mean"]), tuple(config["std"])
    model, report = convert(net, mean=mean, std=std, image_size=train.image_size, **quant)
    name, args = _architecture(recipe.model, net, train.image_size)
    info = ModelInfo(
        name=name,
        args=args,
        num_classes=num_classes,
        image_size=train.image_size,
        classes=train.classes,
        mean=mean,
        std=std,
        quant=quant,
    )
    return model, report, info


def calibrate_on(model: SwitchableModel, images: Split, section: CalibrationSection, *, seed: int) -> None:
    """Sets the quantizer ranges of every precision in place, from some of the images."""
    chosen = images.balanced(min(section.samples, len(images)), seed=seed)
    device = next(model.parameters()).device
    calibrate(model, list(_batches(chosen, device)), method=section.method)


def check_classes(num_classes: int, images: Split) -> None:
    """Refuses images whose number of classes is not that of the model.

    Raises:
        DataError: the numbers differ.
    """
    if num_classes != len(images.classes):
        raise DataError(
            f"the data have {len(images.classes)} classes, but the model has {num_classes}: "
            "use other data, or set model.num_classes to null and train"
        )


def _architecture(section: ModelSection, net: nn.Module, image_size: tuple[int, int]) -> tuple[str, dict[str, object]]:
    """Name and arguments that make the same network again, without the network or folder it came from."""
    args = {**fixed_size_args(section.name, image_size), **section.args}
    if ":" not in section.name:
        return section.name, args
    return net.pretrained_cfg["architecture"], {**net.pretrained_model_args, **args}  # pyright: ignore


def _batches(images: Split, device: torch.device) -> Iterator[Tensor]:
    for indices in torch.arange(len(images)).split(CALIBRATION_BATCH):
        yield images.batch(indices, device=device)[0]
