"""Read float weights from files of any origin. Pickled objects that could run code are never loaded."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qadtr_brevitas.core.errors import CheckpointError
from qadtr_brevitas.data.archives import DATA_VARIABLE, data_folder
from qadtr_brevitas.models.names import without_normalization, without_prefix

# Where training scripts put weights beside other things; those of a moving average come last.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params")
AVERAGES = ("ema", "model_ema", "ema_state_dict", "state_dict_ema", "ema_model", "swa_model")
PREFIXES = ("module.", "_orig_mod.")


def find_weights(path: str | Path) -> Path:
    """Return the file of a path; a relative path is also looked up in the folder that QADTR_BREVITAS_DATA names.

    Raises:
        CheckpointError: there is no such file.
    """
    given = Path(path).expanduser()
    base = data_folder()
    places = [given] if base is None or given.is_absolute() else [given, base / given]
    for place in places:
        if place.is_file():
            return place
    where = " or ".join(str(place) for place in places)
    hint = "" if base or given.is_absolute() else f", set {DATA_VARIABLE} to the folder that holds it,"
    raise CheckpointError(
        f"there is no checkpoint {where}: put it there{hint} or name another with model.checkpoint=FILE "
        "(convert: --checkpoint FILE)"
    )


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Read float weights from .safetensors, or from a file of torch.save (.pth, .pt, .th, .bin).

    A state dict is also found under the keys that training scripts use (`state_dict`, `model`, `net`, ...; `ema` if
    there is no other). The prefixes that DataParallel and torch.compile add to names are removed, and so are the
    counters of profilers and moving averages.

    Returns:
        Tensors on the CPU by parameter name.

    Raises:
        CheckpointError: the file is missing, truncated, holds other objects than tensors and plain values, or holds
            no weights.
    """
    file = find_weights(path)
    stored = _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickled(file)
    found = _state_dict(stored)
    if not found:
        raise CheckpointError(f"{file} holds no weights by name, but {_content(stored)}: save model.state_dict() in it")
    named = {_plain_name(name): value for name, value in found.items()}
    return {name: value for name, value in named.items() if not _is_counter(name)}


def _state_dict(stored: Any) -> Mapping[str, Tensor]:
    """Return the tensors by name within nested mappings; none if there are none, or it is not clear which."""
    if not isinstance(stored, Mapping) or not stored:
        return {}
    items: Mapping[Any, Any] = stored
    if all(isinstance(value, Tensor) for value in items.values()):
        return items
    parts = {key: value for key, value in items.items() if isinstance(value, Mapping)}
    known = (*WRAPPERS, *AVERAGES)
    for key in (*known, *parts):
        # Under a key that is not known, it is not clear which of several mappings is meant.
        if key in parts and (key in known or len(parts) == 1) and (found := _state_dict(parts[key])):
            return found
    return {}


def _content(stored: Any) -> str:
    """Return in words what a file holds."""
    if not isinstance(stored, Mapping):
        return f"{type(stored).__name__}"
    kinds = {str(key): type(value).__name__ for key, value in dict[Any, Any](stored).items()}
    shown = ", ".join(f"{key} ({kind})" for key, kind in list(kinds.items())[:6])
    return (shown + (", ..." if len(kinds) > 6 else "")) or "an empty dict"


def _is_counter(name: str) -> bool:
    last = name.rpartition(".")[2]
    return name == "n_averaged" or last in ("total_ops", "total_params")


def load_into(
    model: nn.Module, weights: Mapping[str, Tensor], *, source: str, name: str, new_head: bool = False
) -> int:
    """Copy weights into a float model, in place; every parameter must be there and have the right shape.

    A normalization that is stored beside them (`mu` and `sigma`, or `mean` and `std`) becomes that of the model's
    `pretrained_cfg`.

    Args:
        model: the float model.
        weights: by parameter name, perhaps all with one prefix, as `model.`; BatchNorm's counters of batches may be
            missing.
        source: where the weights are from, for the error.
        name: name of the model, for the error.
        new_head: whether weights for another number of classes are taken too; the last layer stays as it is.

    Returns:
        How many classes the weights are for.

    Raises:
        CheckpointError: the weights are those of another network, or for another number of classes.
    """
    own = model.state_dict()
    classes = _outputs(model, own)
    weights, statistics = without_normalization(without_prefix(weights, own), own)
    wrong_shape = [key for key in own if key in weights and weights[key].shape != own[key].shape]
    missing = [key for key in own if key not in weights and not key.endswith("num_batches_tracked")]
    unknown = [key for key in weights if key not in own]
    if not missing and not unknown and (given := _other_classes(model, own, weights, wrong_shape)):
        if not new_head:
            raise CheckpointError(
                f"{source} has weights for {given} classes, but {classes} are needed: use data with {given} classes, "
                f"or weights for {classes}; training (`qadtr-brevitas train`) replaces the last layer"
            )
        weights = {key: value for key, value in weights.items() if key not in wrong_shape}
        missing, unknown, wrong_shape, classes = [], [], [], given
    if differing := [*missing, *wrong_shape, *unknown]:
        shared = len(own.keys() & weights.keys()) - len(wrong_shape)
        raise CheckpointError(
            f"{source} does not fit {name}: they share {shared} tensors, but differ in {len(differing)}, for instance "
            f"{', '.join(differing[:3])}; set model.name and model.args to those of the network it comes from"
        )
    model.load_state_dict({**own, **weights})
    if statistics is not None:
        config = getattr(model, "pretrained_cfg", None) or {}
        model.pretrained_cfg = {**config, **statistics}  # pyright: ignore[reportArgumentType]
    return classes


def classes_of_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> int | None:
    """Return how many classes weights are for, if they differ from a network's in that alone; else None."""
    own = model.state_dict()
    weights, _ = without_normalization(without_prefix(weights, own), own)
    wrong_shape = [key for key in own if key in weights and weights[key].shape != own[key].shape]
    return _other_classes(model, own, weights, wrong_shape)


def _other_classes(
    model: nn.Module, own: Mapping[str, Tensor], weights: Mapping[str, Tensor], wrong_shape: Sequence[str]
) -> int | None:
    """Return the number of classes of weights whose tensors of other shapes are those of the last layer; else None."""
    is_head = set(wrong_shape) <= set(_classifier_keys(model, own))
    # Whatever is not counted by class has to agree.
    inner = all(weights[key].shape[1:] == own[key].shape[1:] for key in wrong_shape)
    return len(weights[wrong_shape[0]]) if wrong_shape and is_head and inner else None


def _outputs(model: nn.Module, own: Mapping[str, Tensor]) -> int:
    """Return the number of classes of a network."""
    return next((len(own[key]) for key in _classifier_keys(model, own) if key in own), 0)


def _read_safetensors(file: Path) -> Any:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error


def _read_pickled(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds pickled Python objects, which could run any code, so it is not loaded. If you trust it, "
            f'save its weights anew: python -c "{_saving_anew(file)}"'
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        if _is_scripted(file):
            raise CheckpointError(
                f"{file} holds a scripted or traced network, not weights: save the state_dict() of the network, or of "
                "what torch.jit.load makes of the file"
            ) from error
        raise _damaged(file, error) from error


def _saving_anew(file: Path) -> str:
    """Return Python code that takes the weights out of a pickled model, or of a dict that holds one."""
    keys = repr((*WRAPPERS, *AVERAGES)).replace('"', "'")
    return (
        f"import torch; c = torch.load({str(file)!r}, weights_only=False); "
        f"c = next((c[k] for k in {keys} if k in c), c) if isinstance(c, dict) else c; "
        f"torch.save(c.state_dict() if hasattr(c, 'state_dict') else c, {str(file.with_suffix('.weights.pth'))!r})"
    )


def _is_scripted(file: Path) -> bool:
    try:
        with ZipFile(file) as archive:
            return any("/code/" in name for name in archive.namelist())
    except (BadZipFile, OSError):
        return False


def _damaged(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file} is damaged or incomplete ({str(error) or type(error).__name__}): fetch it again")


def _plain_name(name: str) -> str:
    while stripped := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(stripped)
    return name


def _classifier_keys(model: nn.Module, own: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the weights of the last layer: as timm names it, else that of the last weights."""
    classifier = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    names = names or tuple(name.rpartition(".")[0] for name in list(own)[-1:])
    return [f"{name}.{key}" for name in names for key in ("weight", "bias")]
