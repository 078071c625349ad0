"""Data sets of Hugging Face: a name of the Hub or a folder, which timm calls `hfds/NAME`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Self

from qadtr_brevitas.core.errors import DataError
from qadtr_brevitas.core.extras import require
from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.data.listing import FOLDERS, Pictures
from qadtr_brevitas.data.picture_set import PictureSet
from qadtr_brevitas.data.split import check_split

# What `Dataset.save_to_disk` and `DatasetDict.save_to_disk` write.
_SAVED = ("dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Rows(Pictures):
    """The rows of a split of a Hugging Face data set.

    Args:
        folder: name or folder of the data set.
        classes: names of the classes.
        labels: class of each row.
        digest: changes with the data.
        rows: the `datasets.Dataset`, whose pictures are not decoded.
        column: its column of pictures.
        numbers: which rows these are.
        part: which of the rows these are, in words; "" for all.
    """

    folder: Path
    classes: tuple[str, ...]
    labels: tuple[int, ...]
    digest: str
    rows: Any
    column: str
    numbers: tuple[int, ...]
    part: str = ""

    def name(self, index: int) -> str:
        return f"row {self.numbers[index]} of {self.folder}"

    def read(self, index: int) -> bytes:
        # {"bytes": ..., "path": ...}; pictures of a folder have no bytes.
        picture: dict[str, Any] = self.rows[self.numbers[index]][self.column]
        return picture["bytes"] or Path(picture["path"]).read_bytes()

    def pick(self, indices: Sequence[int], *, part: str) -> Self:
        return replace(
            self,
            labels=tuple(self.labels[index] for index in indices),
            numbers=tuple(self.numbers[index] for index in indices),
            part=f"{self.part} {part}".lstrip(),
        )


@plugin
class HuggingFace(PictureSet):
    """Pictures of a Hugging Face data set, as timm's `hfds/NAME` reads them; needs the package `datasets`.

    `root` is a name of the Hub, which is downloaded once into the cache of `datasets`, or a folder: one that
    `save_to_disk` wrote, or anything that `load_dataset` reads. Classes are numbered as the data set does.
    """

    root: Annotated[str | None, Field(description="name of the data set on the Hub, or a folder")] = None
    subset: Annotated[
        str | None, Field(description="one of the configurations of the data set; null: the only one")
    ] = None
    train_split: Annotated[str, Field(description="name of the split for training")] = "train"
    test_split: Annotated[str | None, Field(description="name of the split for tests; null: test, val, ...")] = None
    image_key: Annotated[str, Field(description="column of the pictures")] = "image"
    label_key: Annotated[str, Field(description="column of the classes")] = "label"

    def list_pictures(self, split: str) -> Rows:
        """Return all rows of one split.

        Raises:
            UsageError: the split has another name, or `datasets` is not installed.
            DataError: there is no such data set, split or column, or rows have no class.
        """
        check_split(split)
        datasets: Any = require("datasets", extra=None, purpose="the data set hfds")
        name, rows = self._rows(datasets, split)
        classes = self._classes(datasets, rows)
        labels = tuple(rows[self.label_key])
        unlabeled = sum(label is None or not 0 <= label < len(classes) for label in labels)
        if unlabeled:
            raise DataError(
                f"{unlabeled} of {len(labels)} rows of the split {name!r} of {self.root} have no class: choose another "
                f"split with data.dataset.{split}_split"
            )
        facts = f"{self.root}\n{self.subset}\n{name}\n{self.image_key}\n{rows._fingerprint}"
        return Rows(
            Path(self.root or ""),
            classes,
            labels,
            blake2b(os.fsencode(facts), digest_size=8).hexdigest(),
            rows.select_columns(self.image_key).cast_column(self.image_key, datasets.Image(decode=False)),
            self.image_key,
            tuple(range(len(labels))),
            split,
        )

    def _rows(self, datasets: Any, split: str) -> tuple[str, Any]:
        """Return the name that the data set has for a split, and the split."""
        if not self.root:
            raise DataError("no data set given: set data.dataset.root to a name of the Hub or a folder")
        try:
            splits = _load(datasets, self.root, self.subset)
        # The package raises errors of many kinds, for what is not there and without a network.
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise DataError(
                f"the data set {self.root} cannot be loaded ({type(error).__name__}: {reason}): set data.dataset.root "
                "to a name of the Hub or a folder, and data.dataset.subset where it has several configurations"
            ) from error
        wanted = self.train_split if split == "train" else self.test_split
        names = FOLDERS[split] if wanted is None else (wanted,)
        found = next((name for name in names if name in splits), None)
        if found is None:
            raise DataError(
                f"{self.root} has no split {' or '.join(names)}: set data.dataset.{split}_split to one of "
                f"{', '.join(splits)}"
            )
        return found, splits[found]

    def _classes(self, datasets: Any, rows: Any) -> tuple[str, ...]:
        """Return the names of the classes, if the columns hold pictures and classes."""
        kinds = {"image_key": datasets.Image, "label_key": datasets.ClassLabel}
        for key, kind in kinds.items():
            column = getattr(self, key)
            if not isinstance(rows.features.get(column), kind):
                fitting = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
                raise DataError(
                    f"{self.root} has no column {column!r} of type {kind.__name__}, but {', '.join(rows.features)}: "
                    f"set data.dataset.{key} to {' or '.join(fitting) or 'one in a data set that has it'}"
                )
        return tuple(rows.features[self.label_key].names)


def _load(datasets: Any, root: str, subset: str | None) -> Mapping[str, Any]:
    """Return the splits of a data set."""
    folder = Path(root).expanduser()
    if any((folder / name).is_file() for name in _SAVED):
        loaded = datasets.load_from_disk(str(folder))
    else:
        loaded = datasets.load_dataset(str(folder) if folder.is_dir() else root, subset)
    # A split that was saved alone.
    return loaded if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
