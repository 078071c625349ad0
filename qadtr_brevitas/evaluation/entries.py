"""What an evaluation compares: models and patches with their names, read from the folders that hold them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from qadtr_brevitas.attacks.own_patch import PICTURE_SUFFIXES, read_picture, read_tensors, scaled
from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.core.errors import DataError, UsageError
from qadtr_brevitas.core.files import fingerprint_tensors
from qadtr_brevitas.core.patch_size import PatchSize
from qadtr_brevitas.data.split import Split, differing_class
from qadtr_brevitas.evaluation.report import PatchFacts, SourceFacts, VariantFacts
from qadtr_brevitas.pipeline.checkpoint import (
    fingerprint_model,
    fingerprint_model_dir,
    load_model,
)
from qadtr_brevitas.pipeline.directories import (
    MODEL_FOLDERS,
    PATCH_SUFFIX,
    is_patch,
    patch_files,
    resolve_model_dir,
)
from qadtr_brevitas.quant import SwitchableModel
from qadtr_brevitas.quant.compiled import compile_passes
from qadtr_brevitas.quant.model_info import ModelInfo


@dataclass(frozen=True)
class LoadedModel:
    """A model under attack.

    Args:
        name: how tables call it; unique among the models.
        model: a switchable model.
        fingerprint: of its weights and of what gives them their meaning.
        info: the float model it was made from, its images and classes.
        path: where it was loaded from.
    """

    name: str
    model: nn.Module
    fingerprint: str
    info: ModelInfo
    path: str = ""

    @classmethod
    def from_model(cls, model: SwitchableModel, *, name: str = "model", info: ModelInfo | None = None) -> LoadedModel:
        """Return a model that exists in memory only, with the fingerprint that its directory would have.

        Args:
            model: a switchable model.
            name: what tables call it.
            info: what the model was made of; None for the model's own.

        Raises:
            UsageError: the model does not know what it was made of.
        """
        if (known := info or model.info) is None:
            raise UsageError("the model does not know what it was made of: convert it with qadtr_brevitas.convert()")
        return cls(name=name, model=model, fingerprint=fingerprint_model(model, known), info=known)

    def check_data(self, split: Split, *, data: str) -> None:
        """Check that images are of the size, and their classes those, that the model was made for.

        Raises:
            DataError: they are not.
        """
        height, width = self.info.image_size
        if (split.image_size, len(split.classes)) != ((height, width), self.info.num_classes):
            given = f"{len(split.classes)} classes and images of {split.image_size[0]}x{split.image_size[1]}"
            raise DataError(
                f"data set {data} has {given}, model {self.name} is for {self.info.num_classes} classes and "
                f"{height}x{width}: choose the data set it was trained on with --data NAME[:ROOT]"
            )
        if (label := differing_class(self.info.classes, split.classes)) is not None:
            raise DataError(
                f"class {label} of data set {data} is {split.classes[label]!r}, that of model {self.name} is "
                f"{self.info.classes[label]!r}: give data with the same classes in the same order "
                "(data.dataset.class_order sets how class folders are numbered)"
            )


@dataclass(frozen=True)
class NamedPatch:
    """A patch under evaluation.

    Args:
        name: how tables call it; unique among the contenders.
        patch: the patch.
        file: where it was loaded from; None for a control.
        control: True for a patch of noise.
        variant: how it was moved or turned; None for a patch as it was made.
    """

    name: str
    patch: Patch
    file: str | None = None
    control: bool = False
    variant: VariantFacts | None = None

    @classmethod
    def of(cls, patch: Patch, *, name: str | None = None) -> NamedPatch:
        """Return a patch from memory; without a name it is called by attack and size, for instance lavan-8x8."""
        height, width = patch.size
        return cls(name or f"{patch.meta.get('attack', 'patch')}-{height}x{width}", patch)

    @property
    def is_own(self) -> bool:
        """Whether it is a user's own patch, which no attack of this package made."""
        return bool(self.patch.meta.get("own"))

    @cached_property
    def facts(self) -> PatchFacts:
        """The patch's entry in the report."""
        patch, meta = self.patch, self.patch.meta
        height, width = patch.size
        place = patch.place if patch.keep_out is None else (patch.place, patch.keep_out)
        source = None
        if "fingerprint" in meta:
            source = SourceFacts(name=meta["model"], fingerprint=meta["fingerprint"], precision=str(meta["precision"]))
        return PatchFacts(
            name=self.name,
            file=self.file,
            fingerprint=fingerprint_tensors([patch.texture, patch.mask], facts=place),
            attack=meta.get("attack", "unknown"),
            settings=dict(meta.get("settings", {})),
            target=meta.get("target"),
            height=height,
            width=width,
            pixels=patch.pixels,
            place=patch.place,
            geometry=fingerprint_tensors([patch.mask], facts=place),
            source=source,
            control=self.control,
            variant=self.variant,
        )


def load_models(
    paths: Sequence[Path], *, device: torch.device | str = "cpu", compiling: Callable[[str], None] | None = None
) -> list[LoadedModel]:
    """Load model or run directories, each named by its folder.

    Args:
        paths: the directories.
        device: where the models are.
        compiling: run the passes of attacks through torch.compile, and call this with what that means; None for not.

    Raises:
        UsageError: the same folder is given twice.
        CheckpointError: a folder holds no model that can be read.
    """
    found = [_load_entry(path, name, device) for path, name in zip(paths, unique_names(paths), strict=True)]
    for loaded in found if compiling is not None else ():
        compile_passes(loaded.model, report=compiling)
    return found


def load_patches(places: Sequence[Path], *, sizes: Sequence[PatchSize] = ()) -> list[NamedPatch]:
    """Load patch files, all patches of folders, and patches of one's own, each named by its file.

    Patches of one's own are pictures, and tensor files of several patches (`attacks.own_patch`).

    Args:
        places: files and folders.
        sizes: boxes that each patch of one's own is scaled to; none to leave it as large as it is.

    Raises:
        UsageError: a place does not exist, a folder holds no patches, or there are sizes and no patch of one's own.
        CheckpointError: a file is no patch.
    """
    files = list(dict.fromkeys(file for place in places for file in _patch_files(place)))
    names = unique_names([file.with_suffix("") for file in files])
    found: list[NamedPatch] = []
    for file, name in zip(files, names, strict=True):
        own = _own_patches(file)
        if own is None:
            found.append(NamedPatch(name, Patch.load(file), str(file)))
            continue
        numbered = {f"{name} {number}" if len(own) > 1 else name: patch for number, patch in enumerate(own)}
        for label, patch in numbered.items():
            found += [NamedPatch(f"{label} {size}", scaled(patch, size), str(file)) for size in sizes]
            found += [] if sizes else [NamedPatch(label, patch, str(file))]
    if sizes and not any(patch_entry.is_own for patch_entry in found):
        raise UsageError(
            "sizes are for patches of one's own, and there are none: give a picture as --patches, or make patches of "
            "other sizes with `qadtr-brevitas attack MODEL_DIR size=N`"
        )
    return found


def _own_patches(file: Path) -> list[Patch] | None:
    """Return the patches of a file that this package did not write; None of one that it wrote."""
    if file.suffix.lower() in PICTURE_SUFFIXES:
        return [read_picture(file)]
    if file.suffix == PATCH_SUFFIX and not is_patch(file):
        return read_tensors(file)
    return None


def unique_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of paths that tell them apart; `last` and `best` keep the name of their run.

    Raises:
        UsageError: the same path twice.
    """
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(_end(part, depth)) for part in parts]
        if len(set(names)) == len(names):
            return names
    if not paths:
        return []
    repeated = next(path for path, part in zip(paths, parts, strict=True) if parts.count(part) > 1)
    raise UsageError(f"{repeated} is given twice: give each folder or file once")


def _end(parts: tuple[str, ...], depth: int) -> tuple[str, ...]:
    says_nothing = parts[-1] in ("", ".", *MODEL_FOLDERS)
    return parts[-(depth + 1 if says_nothing else depth) :]


def _load_entry(path: Path, name: str, device: torch.device | str) -> LoadedModel:
    folder = resolve_model_dir(path)
    model, info = load_model(folder, device=device)
    return LoadedModel(
        name=name,
        # The faster layout for small convolutions, as in training.
        model=model.eval().to(memory_format=torch.channels_last),
        fingerprint=fingerprint_model_dir(folder, info),
        info=info,
        path=str(path),
    )


def _patch_files(place: Path) -> list[Path]:
    if place.is_dir():
        files = patch_files(place)
        if not files:
            raise UsageError(
                f"there are no patches in {place}: make some with `qadtr-brevitas attack MODEL_DIR -o {place}`"
            )
        return files
    if not place.exists():
        raise UsageError(f"there are no patches at {place}: make some with `qadtr-brevitas attack MODEL_DIR`")
    # The picture that is written beside a patch file is enlarged.
    beside = place.with_suffix(PATCH_SUFFIX)
    return [beside if place.suffix == ".png" and beside.is_file() else place]
