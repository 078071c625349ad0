"""The patches of an analysis: finished ones, or some made at the highest precision of each model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qadtr_brevitas.attacks.base import PatchAttack
from qadtr_brevitas.config.slots import slot_name
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.files import fingerprint_facts, fingerprint_file, fingerprint_tensors
from qadtr_brevitas.core.plugin import plugin_settings
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation.craft import CraftSetup, craft, divide_for_crafting
from qadtr_brevitas.evaluation.entries import LoadedModel, NamedPatch, load_patches, unique_names
from qadtr_brevitas.evaluation.predict import placements
from qadtr_brevitas.pipeline.directories import PATCH_FOLDER
from qadtr_brevitas.reproduce.analyses.base import Analysis, AnalysisContext

_KEY_LENGTH = 12
# These settings are part of the names of patch files.
_NAMED_SETTINGS = ("size", "target")


def finished_patches(analysis: Analysis) -> list[str]:
    """Return the fingerprints of the finished patches that an analysis reads.

    The names of the files are not enough: patches may be made again under the same names.

    Raises:
        UsageError: a place holds no patches.
        CheckpointError: a file is not a patch.
    """
    found = load_patches([Path(place) for place in analysis.patches])
    return [fingerprint_file(Path(patch.file)) for patch in found if patch.file]


def reference_patches(
    context: AnalysisContext,
    loaded: LoadedModel,
    attacks: Sequence[PatchAttack],
    *,
    finished: Sequence[str],
    targets: Sequence[int] | None,
) -> list[NamedPatch]:
    """Return patches made at the highest precision of a model, 32 bit if the model has it.

    Args:
        context: the analysis; patches are made in its output folder, and kept.
        loaded: the model.
        attacks: patch attacks, each run on the training images unless there are finished patches.
        finished: patch files and folders to read instead, whatever model they were made on.
        targets: target classes; None for the first three.

    Raises:
        UsageError: none of the finished patches was made at that precision, or there are no training images.
    """
    reference = str(context.precisions(loaded)[0])
    if finished:
        return _made_at(reference, finished)
    folder = context.output / PATCH_FOLDER / loaded.name.replace("/", "-")
    paths = [path for attack in attacks for path in _craft(context, loaded, attack, folder, reference, targets)]
    # The model is part of the name, because several models have patches of the same name.
    return [
        NamedPatch(f"{loaded.name} {name}", found.patch, found.file)
        for name, found in zip(unique_names(paths), load_patches(paths), strict=True)
    ]


def apply_in_turn(patches: Sequence[NamedPatch], images: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    """Put one patch on each image; several patches take turns, so that every image counts once.

    Args:
        patches: at least one.
        images: (N, 3, H, W) in [0, 1].
        seed: seed of the placements.

    Returns:
        The patched images (N, 3, H, W), and the covered pixels, boolean (N, 1, H, W).
    """
    patched, covered = images.clone(), torch.zeros_like(images[:, :1], dtype=torch.bool)
    for turn, named in enumerate(patches):
        chosen = torch.arange(turn, len(images), len(patches))
        size = images.shape[-2], images.shape[-1]
        corners = placements(named.patch, len(images), size, seed=seed)[chosen].to(images.device)
        patch = named.patch.to(images.device)
        white = replace(patch, texture=torch.ones_like(patch.texture))
        patched[chosen] = patch.apply(images[chosen], corners=corners)
        covered[chosen] = white.apply(torch.zeros_like(images[chosen]), corners=corners)[:, :1] > 0
    return patched, covered


def _made_at(precision: str, places: Sequence[str]) -> list[NamedPatch]:
    """Return the patches in these places that were made at a precision, or that do not say where."""
    found = load_patches([Path(place) for place in places])
    wanted = [patch for patch in found if patch.facts.source is None or patch.facts.source.precision == precision]
    if not wanted:
        raise UsageError(
            f"none of the patches in {', '.join(places)} was made at {precision} bit, the precision that the others "
            f"are compared with: make some with `qadtr-brevitas attack MODEL_DIR --precision {precision}`"
        )
    return wanted


def _craft(
    context: AnalysisContext,
    loaded: LoadedModel,
    attack: PatchAttack,
    folder: Path,
    precision: str,
    targets: Sequence[int] | None,
) -> list[Path]:
    name = slot_name(attack)
    train, held_out = divide_for_crafting(context.data.train(), seed=context.seed)
    setup = CraftSetup(
        train=train,
        held_out=held_out,
        output=folder / f"{name}-{_key(context, loaded, attack, held_out, train)}",
        data={"name": context.data.name, "settings": dict(context.data.settings)},
        seed=context.seed,
        batch_size=context.batch_size,
        device=context.device,
        progress=context.progress,
    )
    made = craft(loaded, attack, setup, name=name, precisions=[precision], targets=targets)
    return [patch.path for patch in made]


def _key(context: AnalysisContext, loaded: LoadedModel, attack: PatchAttack, *splits: Split) -> str:
    """Return a key of what file names do not say, so that patches of other settings are kept side by side."""
    settings = {name: value for name, value in plugin_settings(attack).items() if name not in _NAMED_SETTINGS}
    images = fingerprint_tensors([tensor for split in splits for tensor in (split.images, split.labels)])
    return fingerprint_facts([loaded.fingerprint, settings, images, context.seed])[:_KEY_LENGTH]
