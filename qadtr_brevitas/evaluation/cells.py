"""The finished cells of an evaluation, one small file each, so that a killed grid goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from qadtr_brevitas.core.errors import CheckpointError, UsageError
from qadtr_brevitas.core.files import fingerprint_facts, read_json, write_atomically
from qadtr_brevitas.pipeline.directories import CELL_FOLDER

_VERSION = 1
# Images in one forward pass, if nothing else is asked for.
DEFAULT_BATCH_SIZE = 256


@dataclass(frozen=True)
class CellKey:
    """What a patch's predictions depend on, by content: renamed or moved files keep their cells.

    Args:
        model: fingerprint of the model.
        precision: precision of the model, or several together.
        data: fingerprint of the images.
        patch: fingerprint of the patch; None for clean images.
        seed: seed of placements and random precisions; None for clean images that depend on neither.
        batch_size: images in one forward pass, by which rounding differs, and with it levels; None for the default.
    """

    model: str
    precision: str
    data: str
    patch: str | None = None
    seed: int | None = None
    batch_size: int | None = None


@dataclass(frozen=True)
class ChunkKey:
    """What the adversarial images of one chunk depend on, by content; the cell holds the predictions of many models.

    Args:
        attack: fingerprint of the attack and its settings.
        source: fingerprint of the model the attack is made on.
        source_precision: precision, or mean over precisions, it is made at.
        data: fingerprint of all images.
        seed: seed of the attack's random streams.
        start: first image of the chunk.
        stop: the image after its last.
    """

    attack: str
    source: str
    source_precision: str
    data: str
    seed: int
    start: int
    stop: int


@dataclass(frozen=True)
class CertifyKey:
    """What the proofs for one chunk of images depend on, by content; the cell holds the outcomes by name.

    Args:
        model: fingerprint of the model.
        precision: precision of the model, or several together.
        data: fingerprint of all images, which decides the order in which they are certified.
        size: height and width of the patch in pixels, as 3x10.
        method: the certifier.
        masks: fingerprint of the masks, of what they show and of the views averaged.
        start: place in that order of the first image of the chunk.
        stop: the place after its last.
    """

    model: str
    precision: str
    data: str
    size: str
    method: str
    masks: str
    start: int
    stop: int


_Key: TypeAlias = CellKey | ChunkKey | CertifyKey


@dataclass(frozen=True)
class CellStore:
    """Folders of cells: predicted classes, from which every score can be computed anew.

    Args:
        folder: where cells are written and looked for first.
        others: more folders to look in.
    """

    folder: Path
    others: tuple[Path, ...] = ()

    @classmethod
    def open(cls, output: Path, others: Iterable[Path] = ()) -> CellStore:
        """Return the cells of an output folder, and those found in other output folders or `cells` folders.

        Raises:
            UsageError: one of the others holds no cells.
        """
        return cls(output / CELL_FOLDER, tuple(map(_cell_folder, others)))

    def path(self, key: _Key) -> Path:
        """Where a cell is written."""
        return self.folder / _file_name(key)

    def read(self, key: CellKey, *, images: int) -> Tensor | None:
        """(images,) int64 predicted classes of a finished cell; None where it is missing, damaged or another's."""
        return next((found for content in self._contents(key) if (found := _tensor(content, images)) is not None), None)

    def write(self, key: CellKey, predictions: Tensor) -> None:
        """Keep the (images,) predicted classes of a cell.

        Raises:
            CheckpointError: the cell cannot be written.
        """
        self._save(key, predictions.tolist())

    def read_chunk(self, key: ChunkKey | CertifyKey) -> dict[str, Tensor]:
        """(stop - start,) int64 classes a finished chunk holds, by the names of victims or outcomes."""
        found: dict[str, Tensor] = {}
        for content in self._contents(key):
            if isinstance(content, dict):
                for victim, values in cast("dict[str, Any]", content).items():
                    if (predictions := _tensor(values, key.stop - key.start)) is not None:
                        found.setdefault(victim, predictions)
        return found

    def write_chunk(self, key: ChunkKey | CertifyKey, predictions: Mapping[str, Tensor]) -> None:
        """Keep the classes of a chunk, by the names of victims or outcomes.

        Raises:
            CheckpointError: the cell cannot be written.
        """
        self._save(key, {victim: classes.tolist() for victim, classes in predictions.items()})

    def _contents(self, key: _Key) -> Iterable[Any]:
        """Return what the folders hold for a key; a damaged cell costs its time again, not the evaluation."""
        for folder in (self.folder, *self.others):
            path = folder / _file_name(key)
            if not path.exists():
                continue
            try:
                content: Any = read_json(path)
                if content["version"] == _VERSION and content["key"] == _facts(key):
                    yield content["predictions"]
            except (CheckpointError, KeyError, TypeError):
                continue

    def _save(self, key: _Key, predictions: Any) -> None:
        content = {"version": _VERSION, "key": _facts(key), "predictions": predictions}
        # Compact: one line of predictions instead of one line for each image.
        text = json.dumps(content, separators=(",", ":")) + "\n"
        write_atomically(self.path(key), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _facts(key: _Key) -> dict[str, Any]:
    # Cells of older versions do not say the batch size; nearly all have the default one.
    return {name: value for name, value in asdict(key).items() if (name, value) != ("batch_size", None)}


def _file_name(key: _Key) -> str:
    return f"{fingerprint_facts(_facts(key))}.json"


def _tensor(values: Any, images: int) -> Tensor | None:
    try:
        predictions = torch.tensor(values, dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError):
        return None
    return predictions if predictions.shape == (images,) else None


def _cell_folder(place: Path) -> Path:
    folder = place / CELL_FOLDER if (place / CELL_FOLDER).is_dir() else place
    if not any(folder.glob(f"{'[0-9a-f]' * 32}.json")):
        raise UsageError(f"there are no cells in {place}: give the output folder of an evaluation with --cells")
    return folder
