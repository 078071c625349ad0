"""What the functions of the Python interface accept: models, images, patches and attacks in their usual forms."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn

from qadtr_brevitas.attacks.base import ImageAttack
from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.data.batches import Loader, read_split
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation import NamedAttack
from qadtr_brevitas.evaluation.defended_classifier import DefendedClassifier
from qadtr_brevitas.evaluation.entries import LoadedModel, NamedPatch, load_models, load_patches
from qadtr_brevitas.quant import SwitchableModel, get_precision, set_precision

ModelLike: TypeAlias = "SwitchableModel | LoadedModel | DefendedClassifier | str | Path"
"""A switchable model, the folder of a run or model, or what `defend` returns."""

PatchLike: TypeAlias = "Patch | NamedPatch | str | Path"
"""A patch, or a patch file."""

AttackLike: TypeAlias = "ImageAttack | str"
"""A per-image attack, or the name of one."""


def as_loaded(model: ModelLike, *, name: str = "model") -> LoadedModel:
    """Return a model with its name, fingerprint and facts.

    Args:
        model: the model, or the folder of a run or model.
        name: what tables call a model that has no folder.

    Raises:
        UsageError: the model was not converted.
        CheckpointError: the folder holds no model.
    """
    if isinstance(model, (str, Path)):
        return load_models([Path(model)])[0]
    if isinstance(model, DefendedClassifier):
        return replace(model.loaded, name=name)
    return model if isinstance(model, LoadedModel) else _from_memory(model, name)


def _from_memory(model: nn.Module, name: str) -> LoadedModel:
    if not isinstance(model, SwitchableModel):
        raise UsageError(
            f"{type(model).__name__} is not a switchable model: call qadtr_brevitas.convert() on it first "
            "(precisions=[32] keeps it in float)"
        )
    return LoadedModel.from_model(model, name=name)


def as_named_models(models: ModelLike | Sequence[ModelLike] | Mapping[str, ModelLike]) -> list[LoadedModel]:
    """Return one or several models; a mapping gives them names, others are called `model`, `model 2`, ..."""
    if isinstance(models, Mapping):
        return [as_loaded(model, name=name) for name, model in models.items()]
    several = models if isinstance(models, Sequence) and not isinstance(models, str) else [models]
    names = ["model", *(f"model {number}" for number in range(2, len(several) + 1))]
    return [as_loaded(model, name=name) for model, name in zip(several, names, strict=True)]


def as_split(loader: Loader, loaded: LoadedModel, *, images: int | None, seed: int) -> Split:
    """Return labeled images for a model, all of them or a class-balanced random part.

    Raises:
        DataError: there are no images or labels, or labels of classes that the model lacks.
    """
    return read_split(loader, classes=loaded.info.classes).limited(images, seed=seed)


def as_named_patches(patches: Sequence[PatchLike] | Mapping[str, Patch]) -> list[NamedPatch]:
    """Return patches with unique names: those given, those of their files, or attack and size."""
    if isinstance(patches, Mapping):
        return [NamedPatch(name, patch) for name, patch in patches.items()]
    found: list[NamedPatch] = []
    for patch in patches:
        if isinstance(patch, (str, Path)):
            found += load_patches([Path(patch)])
        elif isinstance(patch, NamedPatch):
            found.append(patch)
        else:
            name = _unique(NamedPatch.of(patch).name, [known.name for known in found])
            found.append(NamedPatch.of(patch, name=name))
    return found


def _unique(name: str, known: Sequence[str]) -> str:
    number = 2
    candidate = name
    while candidate in known:
        candidate, number = f"{name} {number}", number + 1
    return candidate


def as_named_attacks(attacks: Sequence[AttackLike]) -> list[NamedAttack]:
    """Return per-image attacks under their registered names.

    Raises:
        UsageError: an unknown name, or an attack that makes universal patches only.
    """
    return [NamedAttack.of(attack) for attack in attacks]


@contextmanager
def prepared(models: Sequence[LoadedModel], *, device: torch.device | str) -> Generator[None]:
    """Put models on a device and in eval mode for the duration of a block; restore mode, precision and device."""
    before = [
        ({module: module.training for module in loaded.model.modules()}, get_precision(loaded.model), _device(loaded))
        for loaded in models
    ]
    for loaded in models:
        loaded.model.to(device).eval()
    try:
        yield
    finally:
        for loaded, (modes, precision, device) in zip(models, before, strict=True):
            loaded.model.to(device)
            set_precision(loaded.model, precision)
            for module, training in modes.items():
                module.training = training


def _device(loaded: LoadedModel) -> torch.device:
    return next(loaded.model.parameters()).device
