"""Save and load switchable models as model directories, {model.safetensors, config.json}.

The config names what makes the float network. Loading a model whose network is made by a function of a Python package
("package.module:function") imports that package, which runs its code: load such models from people you trust only.
"""

from __future__ import annotations

import textwrap
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

from qadtr_brevitas.config.renamed import with_present_names
from qadtr_brevitas.config.slots import slot_name
from qadtr_brevitas.core.errors import CheckpointError, UsageError
from qadtr_brevitas.core.files import fingerprint_bytes, fingerprint_file, read_json, replace_directory, write_json
from qadtr_brevitas.core.plugin import plugin_settings
from qadtr_brevitas.core.precision import parse_precisions
from qadtr_brevitas.models.create import create_float_model
from qadtr_brevitas.models.weights import load_weights
from qadtr_brevitas.pipeline.directories import CONFIG_FILE, WEIGHTS_FILE, resolve_model_dir
from qadtr_brevitas.quant import SwitchableModel, allowed_precisions, convert
from qadtr_brevitas.quant.feature_clip import feature_clips
from qadtr_brevitas.quant.model_info import ModelInfo
from qadtr_brevitas.quant.ptq import ptq_methods

FORMAT = 1
# Settings that the model itself knows, whatever it was converted with.
_OF_THE_MODEL = ("ptq", "wide_head_input", "quantize_once", "feature_clip")
_NET = "net."


def save_model(path: str | Path, model: SwitchableModel, info: ModelInfo | None = None) -> None:
    """Write a model directory, complete or not at all; one that was there stays until the new one is on disk.

    Args:
        path: the folder.
        model: a switchable model.
        info: what it was made of; None for the model's own `info`.

    Raises:
        UsageError: nothing is known of what the model was made of.
        CheckpointError: the disk is full or the folder cannot be written.
    """
    if (info := info or model.info) is None:
        raise UsageError("the model does not record how it was made: convert it with qadtr_brevitas.convert()")
    tensors, stored = stored_tensors(model), stored_info(model, info)

    def fill(folder: Path) -> None:
        save_file(tensors, folder / WEIGHTS_FILE)
        write_json(folder / CONFIG_FILE, {"format": FORMAT, **asdict(stored)})

    replace_directory(Path(path), fill)


def stored_tensors(model: SwitchableModel) -> dict[str, Tensor]:
    """Return the tensors of a model as its directory holds them."""
    # Clones, because safetensors refuses tensors that share memory, as tied weights do.
    return {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}


def stored_info(model: SwitchableModel, info: ModelInfo) -> ModelInfo:
    """Return what a model was made of as its directory holds it: with the precisions and PTQ methods it has."""
    precisions = [p.weight if p.is_tied else str(p) for p in allowed_precisions(model)]
    settings = {key: value for key, value in info.quant.items() if key not in _OF_THE_MODEL}
    methods = [{"name": slot_name(method), **plugin_settings(method)} for method in ptq_methods(model)]
    # Only what differs from a plain conversion, so that equal models have equal fingerprints.
    added: dict[str, Any] = {"ptq": methods} if methods else {}
    added |= {name: True for name in ("wide_head_input", "quantize_once") if getattr(model, name)}
    if clips := feature_clips(model):
        added["feature_clip"] = {"after": [clip.name for clip in clips], "percentile": clips[0].percentile}
    return replace(info, quant={**settings, **added, "precisions": precisions})


def fingerprint_model(model: SwitchableModel, info: ModelInfo) -> str:
    """Return the fingerprint of a model in memory, which is that of its directory once it is saved."""
    return fingerprint_bytes(save(stored_tensors(model)), facts=_meaning(stored_info(model, info)))


def fingerprint_model_dir(folder: Path, info: ModelInfo) -> str:
    """Return the fingerprint of the weights in a model directory and of what gives them their meaning."""
    return fingerprint_file(folder / WEIGHTS_FILE, facts=_meaning(info))


def _meaning(info: ModelInfo) -> dict[str, object]:
    """Return the facts that change what the weights compute: how they are quantized and normalized."""
    return {"name": info.name, "args": info.args, "quant": info.quant, "mean": info.mean, "std": info.std}


def load_model(path: str | Path, *, device: torch.device | str = "cpu") -> tuple[SwitchableModel, ModelInfo]:
    """Load a model or run directory; the model computes bit for bit what the saved one computed.

    If the config names a function of a Python package as the network, that package is imported, which runs its code.

    Returns:
        The switchable model in eval mode on `device`, and what it was made of.

    Raises:
        CheckpointError: there is no model, it is damaged, a newer version of this package wrote it, or the network that
            it names cannot be made.
    """
    folder = resolve_model_dir(path)
    info = read_info(folder)
    weights = load_weights(folder / WEIGHTS_FILE)
    try:
        net = create_float_model(info.name, num_classes=info.num_classes, args=info.args)
        model = convert_again(net, info)
        model.load_state_dict(weights)
        model.info = info
    except (RuntimeError, TypeError, UsageError) as error:
        # Torch names the tensors below a headline.
        lines = [line.strip() for line in str(error).splitlines()]
        found = lines[min(1, len(lines) - 1)] if isinstance(error, RuntimeError) else lines[0]
        reason = textwrap.shorten(found, 200, placeholder=" ...")
        raise CheckpointError(
            f"{folder / CONFIG_FILE} and {WEIGHTS_FILE} do not fit ({reason}): save the model again"
        ) from error
    return model.eval().to(device), info


def convert_again(net: nn.Module, info: ModelInfo, **changes: Any) -> SwitchableModel:
    """Convert a float network in place as a stored model was, with some settings changed.

    Raises:
        UsageError: as in `convert`.
    """
    # Older versions gave the last layer inputs of few bits and quantized sums twice, and recorded nothing.
    settings: dict[str, Any] = {"wide_head_input": False, "quantize_once": False, **info.quant, **changes}
    return convert(net, mean=info.mean, std=info.std, image_size=info.image_size, in_place=True, **settings)


def read_float_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the 32-bit weights of a model or run directory by their names in the float network, without quantizers.

    Raises:
        CheckpointError: as in `load_model`, or the model does not have 32 bit among its precisions.
    """
    folder = resolve_model_dir(path)
    info = read_info(folder)
    if not any(precision.is_float for precision in parse_precisions(info.quant["precisions"])):
        # Training never updated its norm statistics at 32 bit.
        raise CheckpointError(
            f"the model in {folder} cannot run at 32 bit, so it has no float weights to start from: give a model that "
            "was made with 32 in quant.precisions"
        )
    stored = load_weights(folder / WEIGHTS_FILE)
    names = create_float_model(info.name, num_classes=info.num_classes, args=info.args).state_dict()
    return {name: stored[_NET + name] for name in names if _NET + name in stored}


def read_info(path: str | Path) -> ModelInfo:
    """Return what the model of a model or run directory was made of.

    Raises:
        CheckpointError: there is no model, its config is damaged, or a newer version of this package wrote it.
    """
    file = resolve_model_dir(path) / CONFIG_FILE
    config = read_json(file)
    if not isinstance(config, dict) or not isinstance(config.get("format"), int):
        raise CheckpointError(
            f"{file} is not the config of a switchable model: give a directory that this package wrote"
        )
    if config["format"] > FORMAT:
        raise CheckpointError(
            f"{file} has format {config['format']}, but this version reads up to {FORMAT}: "
            "pip install -U qadtr-brevitas"
        )
    known = {field.name for field in fields(ModelInfo)}
    try:
        info = ModelInfo(**{key: value for key, value in config.items() if key in known})
        quant = with_present_names(info.quant)
        if quant.pop("bias_correction", False):
            quant["ptq"] = [{"name": "bias-correction"}]
        info = replace(info, quant=quant)
        height, width = info.image_size
        parse_precisions(info.quant["precisions"])
        return replace(
            info,
            image_size=(height, width),
            classes=tuple(info.classes),
            mean=tuple(info.mean),
            std=tuple(info.std),
        )
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise CheckpointError(f"{file} lacks a key or has a wrong value ({error}): save the model again") from error
