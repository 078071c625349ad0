"""GTSRB, the German traffic signs, in the layouts it is found in."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import model_validator

from qadtr_brevitas.core.errors import DataError
from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.data.archives import ARCHIVE_SUFFIXES, DATA_VARIABLE, data_folder
from qadtr_brevitas.data.image_folder import ImageFolder
from qadtr_brevitas.data.listing import IMAGE_SUFFIXES, Listing, find_root
from qadtr_brevitas.data.split import check_split

SIGNS = (
    *(f"speed limit {limit}" for limit in (20, 30, 50, 60, 70, 80)),
    *("end of speed limit 80", "speed limit 100", "speed limit 120", "no passing", "no passing for trucks"),
    *("priority at the next crossing", "priority road", "give way", "stop", "no vehicles", "no trucks", "no entry"),
    *("danger", "bend to the left", "bend to the right", "double bend", "bumpy road", "slippery road"),
    *("road narrows", "road works", "traffic lights", "pedestrians", "children", "bicycles", "ice or snow"),
    *("wild animals", "end of all limits", "turn right", "turn left", "straight on", "straight on or right"),
    *("straight on or left", "keep right", "keep left", "roundabout", "end of no passing"),
    "end of no passing for trucks",
)
"""The 43 classes, by their number."""

_NAMES = ("gtsrb", "GTSRB", "gtsrb/GTSRB", "GTSRB/GTSRB", "gtsrb32", "gtsrb32-small")
_TRAIN = ("Final_Training/Images", "Training", "train")
_TEST = ("Final_Test/Images", "test")
_TEST_CLASSES = "GT-final_test.csv"
_LAYOUTS = (
    "train/<00..42>/ and test/<00..42>/, or as published: Final_Training/Images/<00000..00042>/, Final_Test/Images/ "
    "and GT-final_test.csv (of GTSRB_Final_Test_GT.zip)"
)


@plugin
class Gtsrb(ImageFolder):
    """GTSRB (Stallkamp et al. 2012): German traffic signs, 43 classes; 39,209 images for training, 12,630 for testing.

    `root` is the unpacked archive (`Final_Training/Images/<class>/*.ppm`, `Final_Test/Images/*.ppm` and
    `GT-final_test.csv`), the folder that torchvision makes of it (`Training/<class>`), a folder or tar
    {train,test}/<00..42>/<image>, or a folder that holds one of these as `gtsrb`, `GTSRB` or `gtsrb32`. A part of the
    images will do, but all 43 classes have to be there.

    Signs are not mirrored in training: with `data.augment: crop-flip` left and right would be one class.
    """

    folder_name: ClassVar[str | None] = "gtsrb"

    image_size: Annotated[int | None, Field(ge=8, description="pixels after resizing; the pictures differ in size")] = (
        32
    )

    @model_validator(mode="after")
    def _has_both_splits(self) -> Gtsrb:
        for key in ("holdout", "class_order"):
            if getattr(self, key) is not None:
                raise ValueError(f"GTSRB has splits and numbered classes of its own: leave {key} out")
        return self

    def list_pictures(self, split: str) -> Listing:
        check_split(split)
        root = _find(self.root)
        folder = next((root / name for name in (_TRAIN if split == "train" else _TEST) if (root / name).is_dir()), None)
        if folder is None:
            raise DataError(f"{root} has no images for {split}: GTSRB lies in {_LAYOUTS}")
        labels = _labels_of_test(root, folder) if folder.parent.name == "Final_Test" else None
        found = _in_class_folders(folder) if labels is None else _in_table(folder, labels)
        files = sorted(found, key=lambda file: (file[1], file[0]))
        _check_all_classes(folder, {label for _, label in files})
        paths, numbers = zip(*files, strict=True)
        return Listing(folder, SIGNS, paths, numbers, _digest(files))


def _find(root: str | None) -> Path:
    """Return the folder that holds the splits.

    Raises:
        DataError: there is none.
    """
    base = Path(root).expanduser() if root else data_folder()
    if base is None or not base.is_dir():
        # A tar, or an error that names the keys.
        return find_root(root, name="gtsrb")
    places = [base, *(base / name for name in _NAMES)]
    archives = [base / f"{name}{suffix}" for name in _NAMES for suffix in ARCHIVE_SUFFIXES]
    for place in places:
        if any((place / name).is_dir() for name in (*_TRAIN, *_TEST)):
            return place
    for archive in archives:
        if archive.is_file():
            return find_root(str(archive))
    raise DataError(
        f"there is no GTSRB in {base}: set data.dataset.root or {DATA_VARIABLE} to a folder that holds {_LAYOUTS}"
    )


def _in_class_folders(folder: Path) -> Iterator[tuple[str, int]]:
    with os.scandir(folder) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir() and entry.name[0] != ".")
    for name in classes:
        if not name.isdecimal() or int(name) >= len(SIGNS):
            raise DataError(f"{folder} has a folder {name!r}, but the classes of GTSRB are 00 to 42: move it away")
        with os.scandir(folder / name) as entries:
            yield from ((e.path, int(name)) for e in entries if e.name.lower().endswith(IMAGE_SUFFIXES))


def _in_table(folder: Path, labels: dict[str, int]) -> Iterator[tuple[str, int]]:
    for name, label in labels.items():
        if not (path := folder / name).is_file():
            raise DataError(
                f"{folder} lacks {name}, which {_TEST_CLASSES} names: unpack GTSRB_Final_Test_Images.zip again"
            )
        yield str(path), label


def _labels_of_test(root: Path, folder: Path) -> dict[str, int]:
    """Return the classes of the test images, which lie in one folder, by their files' names."""
    places = [root, root.parent, folder, folder.parent]
    table = next((place / _TEST_CLASSES for place in places if (place / _TEST_CLASSES).is_file()), None)
    if table is None:
        raise DataError(
            f"{folder} does not say of which classes its images are: put {_TEST_CLASSES} (of GTSRB_Final_Test_GT.zip) "
            f"into {root}"
        )
    try:
        with table.open(encoding="utf-8", newline="") as lines:
            return {row["Filename"]: int(row["ClassId"]) for row in csv.DictReader(lines, delimiter=";")}
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise DataError(f"{table} has no columns Filename and ClassId ({error}): fetch it again") from error


def _check_all_classes(folder: Path, found: set[int]) -> None:
    """Raise if a class is missing: a network of fewer classes would number them otherwise."""
    if missing := [number for number in range(len(SIGNS)) if number not in found]:
        names = ", ".join(f"{number:02} ({SIGNS[number]})" for number in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DataError(
            f"{folder} has no images of class {names}{more}: GTSRB has {len(SIGNS)} classes, fetch them again, or use "
            "the dataset image-folder for a part of them"
        )


def _digest(files: list[tuple[str, int]]) -> str:
    """Return what changes whenever a file is added, removed, renamed or rewritten."""
    digest = blake2b(digest_size=8)
    for path, label in files:
        stat = os.stat(path)
        digest.update(os.fsencode(f"{label}/{path}/{stat.st_size}/{stat.st_mtime_ns}\n"))
    return digest.hexdigest()
