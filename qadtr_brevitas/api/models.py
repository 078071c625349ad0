"""`convert`, `save` and `load`: switchable models from any network, and their folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qadtr_brevitas.config.slots import slot_name
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.plugin import plugin_settings
from qadtr_brevitas.core.precision import DEFAULT_BITS, PrecisionLike
from qadtr_brevitas.data.split import numbered
from qadtr_brevitas.exporting import check_for_target
from qadtr_brevitas.models.describe import describe_network
from qadtr_brevitas.pipeline.checkpoint import load_model, save_model
from qadtr_brevitas.pipeline.directories import check_model_output
from qadtr_brevitas.quant import SwitchableModel
from qadtr_brevitas.quant import convert as convert_network
from qadtr_brevitas.quant.model_info import ModelInfo
from qadtr_brevitas.quant.quantizer import Quantizer

# Settings that are no JSON values, or that saving finds in the model.
_OF_THE_MODEL = ("mean", "std", "in_place", "ptq", "feature_clip")


def convert(
    model: nn.Module,
    precisions: Sequence[PrecisionLike] = DEFAULT_BITS,
    *,
    image_size: tuple[int, int] | None = None,
    classes: Sequence[str] | None = None,
    architecture: str | None = None,
    args: Mapping[str, Any] | None = None,
    **settings: Any,
) -> SwitchableModel:
    """Make a switchable quantized model of a float network, which is left untouched.

    The model takes pixels in [0, 1] and normalizes them by itself, with the mean and std of timm's `pretrained_cfg` or
    those that are given. Its `report` says what was done to every layer. Call `calibrate` next, or train it.

    Args:
        model: a network from images (N, C, H, W) to logits (N, classes).
        precisions: the precisions to switch between, as 4, 32 (not quantized) or "w4a8".
        image_size: height and width of the images; None for those of timm's `pretrained_cfg`.
        classes: names of the classes, in the order of the outputs; None to number them.
        architecture: what makes the network, so that `save` and `load` know it: a name of timm or torchvision, or
            "package.module:function". None for the name that timm's own networks carry.
        args: further keyword arguments of what makes the network.
        settings: as of `qadtr_brevitas.quant.convert`: mean, std, first_last, residual, norm, narrow_range,
            per_channel, activations, attention_scales, target, weight_quantizer, act_quantizer, softmax_quantizer,
            gelu_quantizer, ptq, feature_clip, layers.

    Raises:
        UsageError: the network returns something else than logits, has no parameters, has nothing to quantize or
            computes in a way that cannot be followed; or `architecture` makes another network.
        ExportError: the compiler of `target` cannot take the network, layer by layer (where the libraries of exports
            are installed).
    """
    converted = convert_network(model, precisions, image_size=image_size, **settings)
    check_for_target(converted, settings.get("target"))
    outputs = converted.num_classes
    if classes is not None and len(classes) != outputs:
        raise UsageError(f"{len(classes)} names of classes for a network of {outputs} outputs: give one for each")
    name, found_args = describe_network(model, architecture, args, num_classes=outputs)
    quant = {key: _as_json(value) for key, value in settings.items() if key not in _OF_THE_MODEL}
    converted.info = ModelInfo(
        name=name,
        args=found_args,
        num_classes=outputs,
        image_size=converted.image_size,
        classes=numbered(outputs) if classes is None else tuple(classes),
        mean=tuple(converted.mean.flatten().tolist()),
        std=tuple(converted.std.flatten().tolist()),
        quant={**quant, "precisions": list(precisions)},
        source="qadtr_brevitas.convert",
    )
    return converted


def _as_json(value: Any) -> Any:
    return {"name": slot_name(value), **plugin_settings(value)} if isinstance(value, Quantizer) else value


def save(model: SwitchableModel, folder: str | Path) -> Path:
    """Write a model directory, complete or not at all, which `load` and every command take.

    Args:
        model: a switchable model.
        folder: the folder; an existing model is replaced.

    Returns:
        The folder.

    Raises:
        UsageError: it is not known what makes the network again, or the folder holds more than a model.
        CheckpointError: the folder cannot be written.
    """
    info = model.info
    if info is None or not info.name:
        kind = type(model.net).__name__
        raise UsageError(
            f"{kind} cannot be saved, because nothing says how to make it again: give convert() "
            f'architecture="package.module:{kind}", or the name of a timm model'
        )
    check_model_output(Path(folder), advice="choose another folder")
    save_model(folder, model, info)
    return Path(folder)


def load(folder: str | Path, *, device: torch.device | str = "cpu") -> SwitchableModel:
    """Load the model of a model or run directory, in eval mode.

    A model that names a function of a package of yours imports that package.

    Args:
        folder: a model directory, or a run directory, of which the last model is loaded.
        device: where to.

    Raises:
        CheckpointError: there is no model, it is damaged, or a newer version wrote it.
    """
    return load_model(folder, device=device)[0]
