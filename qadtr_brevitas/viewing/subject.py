"""What is looked at: a model, or the models of a report with its patches and images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qadtr_brevitas.attacks.own_patch import PICTURE_SUFFIXES, read_picture, scaled
from qadtr_brevitas.core.errors import CheckpointError
from qadtr_brevitas.core.patch_size import PatchSize
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.evaluation.report import EvaluationReport, read_report
from qadtr_brevitas.pipeline.directories import Kind, patch_files, patch_folder, what_is


@dataclass(frozen=True)
class Subject:
    """What is looked at.

    Args:
        models: model or run directories.
        patches: files and folders of patches; none for one of noise.
        sizes: boxes that pictures among the patches are scaled to; none to leave them as large as they are.
        data: the data set as NAME[:ROOT] or with its settings; None for that of the models.
        fingerprints: what the weights of the models have to be; None for any.
    """

    models: tuple[Path, ...]
    patches: tuple[Path, ...]
    sizes: tuple[PatchSize, ...] = ()
    data: str | None = None
    fingerprints: tuple[str, ...] | None = None

    def check(self, models: Sequence[LoadedModel]) -> None:
        """Check that the models are those that a report is of.

        Raises:
            CheckpointError: one was trained again since.
        """
        for loaded, fingerprint in zip(models, self.fingerprints or (), strict=False):
            if loaded.fingerprint != fingerprint:
                raise CheckpointError(
                    f"{loaded.path} has other weights than the report is of: evaluate it again, or give {loaded.path} "
                    "itself to look at what it is today"
                )


def find_subject(
    place: Path, *, patches: Sequence[Path] = (), sizes: Sequence[PatchSize] = (), data: str | None = None
) -> Subject:
    """Return what a path stands for.

    Args:
        place: a model or run directory, a report.json or the folder of one.
        patches: what to look at instead of the patches that are there.
        sizes: boxes that pictures are scaled to, instead of the recorded ones.
        data: what to look at instead of the images that are recorded.

    Raises:
        CheckpointError: a report that cannot be read, or whose models are not where it says.
    """
    if what_is(place) is Kind.REPORT:
        found = _of_report(read_report(place), place)
        if patches:
            found = replace(found, patches=tuple(patches), sizes=())
        return replace(found, sizes=tuple(sizes) or found.sizes, data=data or found.data)
    own = patch_folder(place)
    return Subject((place,), tuple(patches) or ((own,) if patch_files(own) else ()), tuple(sizes), data)


def _of_report(report: EvaluationReport, place: Path) -> Subject:
    for model in report.models:
        if not model.path:
            raise CheckpointError(f"{place} is of {model.name}, which was in memory only: save it with qb.save")
        if not Path(model.path).exists():
            raise CheckpointError(
                f"{place} is of {model.path}, and there is no such folder here: go where the report was made"
            )
    patches = [(Path(patch.file), patch) for patch in report.patches if patch.file and Path(patch.file).is_file()]
    pictures = [
        (file, PatchSize(patch.height, patch.width))
        for file, patch in patches
        if file.suffix.lower() in PICTURE_SUFFIXES and patch.variant is None
    ]
    return Subject(
        models=tuple(Path(model.path) for model in report.models),
        patches=tuple(dict.fromkeys(file for file, _ in patches)),
        sizes=tuple(dict.fromkeys(_box(file, size) for file, size in pictures)),
        # JSON is YAML, which is what a choice of settings is read as.
        data=json.dumps({"name": report.data.name, **report.data.settings}),
        fingerprints=tuple(model.fingerprint for model in report.models),
    )


def _box(file: Path, size: PatchSize) -> PatchSize:
    """Return the box in which a picture, whose proportions stay, becomes as large as it was."""
    picture = read_picture(file)
    boxes = [PatchSize(size.height + rows, size.width + columns) for rows in (0, 1) for columns in (0, 1)]
    return next((box for box in boxes if scaled(picture, box).size == (size.height, size.width)), size)
