"""The finished cells of an evaluation, one small file each, so that a killed grid goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qadtr_brevitas.errors import CheckpointError
from qadtr_brevitas.files import read_json, write_atomically
from qadtr_brevitas.fingerprints import fingerprint_facts

_VERSION = 1


@dataclass(frozen=True)
class CellKey:
    """What a cell's predictions depend on, by content: renamed or moved files keep their cells.

    Args:
        model: fingerprint of the model.
        precision: precision of the model.
        data: fingerprint of the images.
        patch: fingerprint of the patch; None for clean images.
        seed: seed of the placements; None for clean images, which depend on no seed.
    """

    model: str
    precision: str
    data: str
    patch: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class CellStore:
    """A folder of cells: predicted classes, from which every score can be computed anew."""

    folder: Path

    def path(self, key: CellKey) -> Path:
        """Where a cell is kept."""
        return self.folder / f"{fingerprint_facts(asdict(key))}.json"

    def read(self, key: CellKey, *, images: int) -> Tensor | None:
        """(images,) int64 predicted classes of a finished cell; None where it is missing, damaged or another's."""
        path = self.path(key)
        if not path.exists():
            return None
        try:
            content: dict[str, Any] = read_json(path)
            if content["version"] != _VERSION or content["key"] != asdict(key):
                return None
            predictions = torch.tensor(content["predictions"], dtype=torch.int64)
        # A damaged cell costs its time again, not the evaluation.
        except (CheckpointError, KeyError, TypeError, ValueError):
            return None
        return predictions if predictions.shape == (images,) else None

    def get(self, key: CellKey, compute: Callable[[], Tensor], *, images: int) -> Tensor:
        """A finished cell's predictions, or those of `compute`, which are kept.

        Raises:
            CheckpointError: the cell cannot be written.
        """
        if (found := self.read(key, images=images)) is not None:
            return found
        predictions = compute()
        content = {"version": _VERSION, "key": asdict(key), "predictions": predictions.tolist()}
        # Compact: one line of predictions instead of one line for each image.
        text = json.dumps(content, separators=(",", ":")) + "\n"
        write_atomically(self.path(key), lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return predictions
