"""The facts that are stored beside the weights of a switchable model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a switchable model was made of.

    Args:
        name: name of the float network: timm's, torchvision's, or `package.module:function`; empty for a network
            without a name, which can be used but not saved.
        args: further arguments of the function that makes the network.
        num_classes: number of logits.
        image_size: height and width of the images it was made for, in pixels.
        classes: names of the classes, in the order of the outputs.
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
        quant: keyword arguments of `convert()`; `precisions` is written as the model has them when it is saved.
        source: what made it, for instance the name of a recipe.
        data: the data set it was made on, as in a recipe: `{name: X, <fields of X>}`; None if unknown.
    """

    name: str
    args: Mapping[str, Any]
    num_classes: int
    image_size: tuple[int, int]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    quant: Mapping[str, Any]
    source: str = ""
    data: Mapping[str, Any] | None = None
