"""Build data, float network and switchable model from the sections of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from qadtr_brevitas.config import DataSection, ModelSection, Recipe
from qadtr_brevitas.core.errors import DataError, UsageError
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.core.seeding import derive_seed
from qadtr_brevitas.data.split import SPLITS, Split, differing_class, numbered
from qadtr_brevitas.models.channels import image_format
from qadtr_brevitas.models.create import create_float_model, fixed_size_args, model_config, own_image_size
from qadtr_brevitas.models.python_functions import is_function_name
from qadtr_brevitas.models.weights import classes_of_weights, load_into, load_weights
from qadtr_brevitas.pipeline.checkpoint import read_float_weights, read_info
from qadtr_brevitas.quant import SwitchableModel, convert
from qadtr_brevitas.quant.model_info import ModelInfo


class Splits(NamedTuple):
    """The images of a run: for training, for choosing the best model (or None), and for testing."""

    train: Split
    val: Split | None
    test: Split


Report: TypeAlias = Callable[[str], None]
"""Called with sentences for people."""


def fit_data(recipe: Recipe, *, report: Report | None = None) -> Recipe:
    """Return the recipe with what its data set leaves open: test images, and the size of images that differ in size.

    Images that all lie in one place are divided into train and test, and images of different sizes get the size and
    crop of the model.

    Args:
        recipe: the recipe.
        report: called with a sentence if images are held out for tests.

    Raises:
        DataError: the data are missing or damaged, or the images of the model are not square.
        UsageError, CheckpointError: as in `build_model`.
    """
    dataset, decision = recipe.data.dataset.completed(SPLITS)
    if decision is not None:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"dataset": dataset})})
        _tell(report, decision)
    section = recipe.model
    if not dataset.needs_size():
        return recipe
    size, crop = own_image_size(section.name, section.args)
    if section.checkpoint is not None and _is_model_dir(section.checkpoint):
        size, width = read_info(section.checkpoint).image_size
        if size != width:
            raise DataError(
                f"{section.checkpoint} is for images of {size}x{width}, but those of the data have different sizes and "
                f"would be made square: give images that all are {size}x{width}"
            )
    data = recipe.data.model_copy(update={"dataset": dataset.fitted(size, crop)})
    return recipe.model_copy(update={"data": data})


def build_split(
    section: DataSection,
    split: Literal["train", "test"],
    *,
    seed: int,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Split:
    """Load one split with the limits of the section; images beyond a limit are not read.

    Args:
        section: the data set and its limits.
        split: the split to load.
        seed: seed of the choice of images under a limit.
        limit: another limit, beside those of the section.
        progress: called with the images done and the images in all.

    Raises:
        DataError: the data are missing or damaged.
    """
    limits = (limit, section.train_limit if split == "train" else section.test_limit)
    smallest = min((number for number in limits if number is not None), default=None)
    dataset = section.dataset
    if split == "train" and section.transform is not None and section.transform.scale is not None:
        dataset = dataset.with_whole_pictures()
    return dataset.load(split, limit=smallest, seed=seed, progress=progress)


def build_splits(section: DataSection, *, seed: int, progress: Progress | None = None) -> Splits:
    """Load the data, and hold out `val_share` of the training images.

    Raises:
        DataError: the data are missing or damaged, or no training image is left.
    """
    train = build_split(section, "train", seed=seed, progress=progress)
    test = build_split(section, "test", seed=seed, progress=progress)
    if not section.val_share:
        return Splits(train, None, test)
    held_out = max(1, round(section.val_share * len(train)))
    if held_out >= len(train):
        raise DataError(
            f"data.val_share={section.val_share:g} leaves none of the {len(train)} training images: give less"
        )
    val, train = train.divide(held_out, seed=seed)
    return Splits(train, val, test)


def no_images(section: ModelSection) -> Split:
    """Return an empty split with the image size and the number of classes that a network is made for.

    Raises:
        UsageError, CheckpointError: as in `build_model`.
    """
    size, _ = own_image_size(section.name, section.args)
    labels = torch.empty(0, dtype=torch.int64)
    classes = numbered(section.num_classes or own_classes(section))
    return Split(torch.empty(0, 3, size, size, dtype=torch.uint8), labels, classes)


def build_model(
    section: ModelSection,
    *,
    num_classes: int,
    image_size: tuple[int, int],
    new_head: bool = False,
    report: Report | None = None,
) -> nn.Module:
    """Make the float network, with weights if the section names any.

    Args:
        section: name, arguments and weights of the network.
        num_classes: number of outputs.
        image_size: height and width of the images, in pixels.
        new_head: whether weights for another number of classes are taken too, all but those of the last layer, which
            is then random and has to be trained.
        report: called with a sentence if the last layer is random.

    Raises:
        UsageError: the name or an argument is unknown.
        DataError: the arguments set an image size that the images do not have.
        CheckpointError: the weights cannot be read, or belong to another network or number of classes.
    """
    args = _all_args(section, image_size)
    model = create_float_model(section.name, pretrained=section.pretrained, num_classes=num_classes, args=args)
    if section.checkpoint is not None:
        source, weights = section.checkpoint, _read_weights(section.checkpoint)
        given = load_into(model, weights, source=source, name=section.name, new_head=new_head)
    else:
        published = getattr(model, "pretrained_cfg", None) or {}
        source = f"pretrained {section.name}"
        given = published.get("num_classes", num_classes) if section.pretrained else num_classes
    if given != num_classes:
        _tell(
            report,
            f"{source} has weights for {given} classes: the last layer, for {num_classes}, is new and random, all "
            "others start from these weights",
        )
    return model


def _tell(report: Report | None, sentence: str) -> None:
    if report is not None:
        report(sentence)


def _read_weights(checkpoint: str) -> Mapping[str, Tensor]:
    return (read_float_weights if _is_model_dir(checkpoint) else load_weights)(checkpoint)


def build_switchable(
    recipe: Recipe,
    train: Split,
    *,
    only_ranges: bool = False,
    new_head: bool = False,
    report: Report | None = None,
) -> tuple[SwitchableModel, ModelInfo]:
    """Make the float network for the images and convert it, without calibration.

    Args:
        recipe: a recipe, of which the sections `model`, `data` and `quant` are used.
        train: the training images, for their size and classes.
        only_ranges: whether the images only serve to choose ranges; a network with weights then keeps its classes and
            their names, whatever the classes of the images are.
        new_head: as in `build_model`: whether the network is trained, from weights for any number of classes.
        report: as in `build_model`.

    Returns:
        The switchable model, and what it was made of, which is its `info` too.

    Raises:
        DataError: the data have another number of classes than `model.num_classes`, or images of a size that the
            network does not take.
        UsageError, CheckpointError: as in `build_model` and `convert`.
    """
    data = recipe.data.model_dump(mode="json")["dataset"]
    if only_ranges:
        classes, data = _kept_classes(recipe.model, train, data)
    else:
        classes = train.classes
        check_classes(recipe.model.num_classes or len(classes), train)
    # Random weights are those of the seed, whatever ran before.
    torch.manual_seed(derive_seed(recipe.seed, "build"))
    net = build_model(
        recipe.model, num_classes=len(classes), image_size=train.image_size, new_head=new_head, report=report
    )
    mean, std = _pixel_statistics(recipe.model, net)
    # Only what differs from a plain conversion, so that equal models have equal fingerprints.
    later = ("feature_clip", "layers", "softmax_quantizer", "gelu_quantizer")
    unused = {"calibration"} | {key for key in later if not getattr(recipe.quant, key)}
    if recipe.quant.attention_scales == "tensor":
        unused.add("attention_scales")
    quant = recipe.quant.model_dump(mode="json", exclude=unused)
    name, args = _architecture(recipe.model, net, train.image_size)
    ptq = recipe.quant.calibration.weights
    model = convert(net, mean=mean, std=std, image_size=train.image_size, ptq=ptq, in_place=True, **quant)
    classes = _checked_classes(model, classes, recipe.model.name, len(train))
    info = model.info = ModelInfo(
        name=name,
        args=args,
        num_classes=len(classes),
        image_size=train.image_size,
        classes=classes,
        mean=tuple(model.mean.flatten().tolist()) if mean is None else mean,
        std=tuple(model.std.flatten().tolist()) if std is None else std,
        quant=quant,
        data=data,
    )
    return model, info


def check_classes(num_classes: int, images: Split) -> None:
    """Raise if images have another number of classes than the model.

    Raises:
        DataError: the numbers differ.
    """
    if num_classes != len(images.classes):
        raise DataError(
            f"the data have {len(images.classes)} classes, but the model has {num_classes}: "
            "use other data, or set model.num_classes to null and train"
        )


def _checked_classes(model: SwitchableModel, classes: tuple[str, ...], name: str, images: int) -> tuple[str, ...]:
    """Return the names of the classes; number them if a network without `num_classes` decides how many there are."""
    if model.num_classes == len(classes):
        return classes
    if images == 0:
        return numbered(model.num_classes)
    raise UsageError(
        f"{name} has {model.num_classes} outputs, but {len(classes)} classes are needed: let it take num_classes, or "
        "give data of as many classes"
    )


def own_classes(section: ModelSection) -> int:
    """Return the number of outputs that a network has by default, which its published weights have too.

    Raises:
        UsageError, CheckpointError: as in `build_model`.
    """
    return model_config(section.name).get("num_classes", 1000)


def _kept_classes(
    section: ModelSection, images: Split, data: Mapping[str, Any]
) -> tuple[tuple[str, ...], Mapping[str, Any] | None]:
    """Return the names of a network's own classes, and the data set that they belong to, if that is known."""
    if section.checkpoint is not None and _is_model_dir(section.checkpoint):
        stored = read_info(section.checkpoint)
        if len(stored.classes) != len(images.classes) or differing_class(stored.classes, images.classes) is not None:
            return stored.classes, stored.data
        return (images.classes if stored.classes == numbered(len(stored.classes)) else stored.classes), data
    count = section.num_classes or _classes_of(section, images)
    return (images.classes, data) if count == len(images.classes) else (numbered(count), None)


def _classes_of(section: ModelSection, images: Split) -> int:
    """Return how many classes the weights of a section are for; without weights, those of the images."""
    count = len(images.classes)
    if section.checkpoint is None:
        return own_classes(section) if section.pretrained else count
    args = _all_args(section, images.image_size)
    net = create_float_model(section.name, num_classes=count, args=args)
    return classes_of_weights(net, load_weights(section.checkpoint)) or count


def _is_model_dir(checkpoint: str) -> bool:
    return Path(checkpoint).expanduser().is_dir()


def _all_args(section: ModelSection, image_size: tuple[int, int]) -> dict[str, Any]:
    """Return the arguments of the section, with the image size for a network that needs it as an argument."""
    size_args = fixed_size_args(section.name, image_size)
    for key, size in size_args.items():
        given = section.args.get(key, size)
        if _as_pair(given) != _as_pair(size):
            height, width = _as_pair(given)
            raise DataError(
                f"the images are {image_size[0]}x{image_size[1]}, but model.args.{key} makes {section.name} for "
                f"{height}x{width} only: set data.dataset.image_size={height}, or use other data"
            )
    return {**size_args, **section.args}


def _as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _pixel_statistics(
    section: ModelSection, net: nn.Module
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Return mean and std of pixels in [0, 1], as the weights were trained with; None if nothing records them."""
    if section.checkpoint is not None and _is_model_dir(section.checkpoint):
        info = read_info(section.checkpoint)
        return info.mean, info.std
    if not getattr(net, "pretrained_cfg", None):
        return None, None
    config, images = resolve_data_config({}, model=net), image_format(net)
    if len(config["mean"]) != images.size[0]:
        return images.mean, images.std
    return tuple(config["mean"]), tuple(config["std"])


def _architecture(section: ModelSection, net: nn.Module, image_size: tuple[int, int]) -> tuple[str, dict[str, object]]:
    """Return a name and arguments that make the same network again, without access to a hub or to its folder."""
    args = _all_args(section, image_size)
    if ":" not in section.name or is_function_name(section.name):
        return section.name, args
    return net.pretrained_cfg["architecture"], {**net.pretrained_model_args, **args}  # pyright: ignore
