"""Which images lie in a folder ROOT/<split>/<class>/ or ROOT/<class>/, and how their classes are numbered."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Literal, Self, TypeAlias
from unicodedata import normalize

from qadtr_brevitas.core.errors import DataError
from qadtr_brevitas.data.archives import ARCHIVE_SUFFIXES, DATA_VARIABLE, data_folder, unpack
from qadtr_brevitas.data.split import check_split

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp"),
    *(".avif", ".gif", ".jfif", ".jpe", ".pgm", ".pnm", ".ppm", ".tif", ".tiff"),
)
OTHER_PICTURES = (
    *(".cr2", ".dds", ".dng", ".exr", ".hdr", ".heic", ".heif", ".j2k", ".jp2", ".jxl", ".nef", ".psd", ".tga"),
)
"""Pictures that are not read. They are no reason to read the others without a word."""
FOLDERS = {"train": ("train", "training"), "test": ("test", "val", "valid", "validation")}
_ONE_FOLDER_FOR_ALL = {"images"}
# macOS adds this folder to archives.
_NO_CLASSES = ("__MACOSX",)
DEFAULT_HOLDOUT = 5
"""Of images in one place, the first of so many is for tests."""
LAYOUT = "ROOT/{train,test}/<class>/<image>"

ClassOrder: TypeAlias = Literal["name", "natural"]
"""How class folders are numbered: by name (torchvision), or with numbers by their value (timm)."""


class Pictures(ABC):
    """Encoded pictures with labels, which are read one at a time.

    Attributes:
        folder: where they lie.
        classes: names of the classes.
        labels: index of each picture's class.
        digest: changes whenever a picture is added, removed, renamed or rewritten.
        part: which of the pictures in the folder these are, in words that do not depend on them; "" for all.
    """

    folder: Path
    classes: tuple[str, ...]
    labels: tuple[int, ...]
    digest: str
    part: str

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def name(self, index: int) -> str:
        """Return where a picture lies, for messages."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Return an encoded picture.

        Raises:
            OSError: it cannot be read.
        """

    @abstractmethod
    def pick(self, indices: Sequence[int], *, part: str) -> Self:
        """Return some of the pictures only; `classes` stays whole, so labels keep their meaning."""


@dataclass(frozen=True)
class Listing(Pictures):
    """The images of one split, by class and then by name.

    Args:
        folder: the folder that holds the class folders.
        classes: names of the class folders in the order of the labels, in Unicode's composed form (NFC).
        paths: image files.
        labels: index of each file's class.
        digest: changes whenever a file is added, removed, renamed or rewritten.
        part: which of the files these are, in words that do not depend on the files; "" for all.
    """

    folder: Path
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    digest: str
    part: str = ""

    def name(self, index: int) -> str:
        return printable(self.paths[index])

    def read(self, index: int) -> bytes:
        with open(self.paths[index], "rb") as file:
            return file.read()

    def pick(self, indices: Sequence[int], *, part: str) -> Self:
        return replace(
            self,
            paths=tuple(self.paths[index] for index in indices),
            labels=tuple(self.labels[index] for index in indices),
            part=f"{self.part} {part}".lstrip(),
        )


def find_root(root: str | None, *, name: str | None = None) -> Path:
    """Return the folder that holds the splits.

    Args:
        root: a folder, or a tar or zip; None for the folder that QADTR_BREVITAS_DATA names.
        name: also accepts a folder that holds a folder `name` or a file `name.tar`.

    Raises:
        DataError: nothing is there, or QADTR_BREVITAS_DATA is needed and not set.
    """
    base = Path(root).expanduser() if root else data_folder()
    what = f"a folder that holds {name} or {name}.tar" if name else f"a folder laid out as {LAYOUT}"
    if base is None:
        raise DataError(f"no data folder given: set data.dataset.root or {DATA_VARIABLE} to {what}")
    if not base.exists():
        given = "data.dataset.root" if root else DATA_VARIABLE
        raise DataError(f"there is no folder {base}: set {given} to {what}")
    inner = [base / f"{name}{suffix}" for suffix in ("", *ARCHIVE_SUFFIXES)] if name else []
    is_outer = base.is_dir() and _split_folder(base) is None
    found = next((path for path in inner if is_outer and path.exists()), base)
    return found if found.is_dir() else _content_folder(unpack(found))


def list_images(root: Path, split: str, *, holdout: int | None = None, order: ClassOrder | None = None) -> Listing:
    """List the images of one split.

    Args:
        root: holds the folders of the splits; or only one of them, or the class folders themselves.
        split: "train" or "test".
        holdout: where all images are in one place, the first of every so many is for testing and the others are for
            training. None where there is a folder for each.
        order: how classes are numbered; None where both orders are the same.

    Raises:
        UsageError: a split other than "train" and "test".
        DataError: no such split, no class folders, a class without images, pictures that are not read, splits whose
            classes differ, a holdout where there are two splits or none where it is needed, or no order where it
            matters.
    """
    check_split(split)
    folder = _split_folder(root, split)
    if holdout is None:
        if folder is None:
            raise _no_split(root, split)
        _check_same_classes(root, split)
        return _list_folder(folder, order)
    folders = [found for name in FOLDERS if (found := _split_folder(root, name))]
    if len(folders) == 2:
        both = " and ".join(path.name for path in folders)
        raise DataError(
            f"{root} has {both} folders, so data.dataset.holdout={holdout} would leave images out: set it to null"
        )
    listing = _list_folder(folders[0] if folders else root, order)
    indices = [index for index in range(len(listing.paths)) if (index % holdout == 0) == (split == "test")]
    return listing.pick(indices, part=f"{split} of holdout {holdout}")


def needs_holdout(root: Path, needed: Collection[str]) -> bool:
    """Return whether images lie in one place that have to serve for training and for tests.

    Args:
        root: as in `list_images`.
        needed: splits that will be listed; those of the class folders themselves always need a holdout.

    Raises:
        DataError: as in `list_images`, for class folders.
    """
    there = {name for name in FOLDERS if _split_folder(root, name)}
    if there:
        return len(there) == 1 and not there >= set(needed)
    return any(map(_has_images, _class_folders(root).values()))


def _no_split(root: Path, split: str) -> DataError:
    wanted = {"train": "train", "test": "test or val"}[split]
    other = _split_folder(root)
    if other is None and not any(map(_has_images, _class_folders(root).values())):
        return DataError(f"{root} has no folder {wanted}: images must lie in {LAYOUT}")
    there = f"only {other.name}" if other else "class folders at once"
    return DataError(
        f"{root} has no folder {wanted}, {there}: set data.dataset.holdout={DEFAULT_HOLDOUT} to test on every fifth "
        "image there is and train on the others"
    )


def _list_folder(folder: Path, order: ClassOrder | None) -> Listing:
    """All images below class folders."""
    folders = _class_folders(folder)
    if not folders:
        raise DataError(f"{folder} is empty: images must lie in {LAYOUT}")
    classes = _ordered(folder, list(folders), order)
    paths: list[str] = []
    labels: list[int] = []
    digest = blake2b(digest_size=8)
    for label, name in enumerate(classes):
        entries = list(_images_below(folders[name]))
        if not entries:
            kinds = ", ".join(IMAGE_SUFFIXES)
            raise DataError(f"{folders[name]} has no images ({kinds}): add some or delete the folder")
        for entry in entries:
            stat = entry.stat()
            place = entry.path[len(os.fspath(folders[name])) :]
            digest.update(os.fsencode(f"{name}{place}/{stat.st_size}/{stat.st_mtime_ns}\n"))
        paths += [entry.path for entry in entries]
        labels += [label] * len(entries)
    return Listing(folder, classes, tuple(paths), tuple(labels), digest.hexdigest())


def _ordered(folder: Path, classes: Sequence[str], order: ClassOrder | None) -> tuple[str, ...]:
    """Sort class names.

    Raises:
        DataError: no order is given where the two differ.
    """
    by_name, by_number = sorted(classes), sorted(sorted(classes), key=_natural_key)
    if order is None and by_name != by_number:
        first = next(label for label, pair in enumerate(zip(by_name, by_number, strict=True)) if len(set(pair)) > 1)
        raise DataError(
            f"class {first} of {folder} is {by_name[first]!r} in the order of names, as torchvision numbers classes, "
            f"and {by_number[first]!r} in natural order, as timm does: set data.dataset.class_order=name or "
            "data.dataset.class_order=natural, as the model was trained (of a model that is there already with --data "
            "'{name: image-folder, root: ROOT, class_order: name}'; models of earlier releases are by name)"
        )
    return tuple(by_number if order == "natural" else by_name)


def _natural_key(name: str) -> list[int | str]:
    """Return the key of timm's order: numbers by their value, letters without their case."""
    # Digits are at the odd places.
    parts = re.split(r"([0-9]+)", name.lower())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]


def _content_folder(unpacked: Path) -> Path:
    """Return the one folder that holds everything in an unpacked archive, or the top."""
    entries = [entry for entry in unpacked.iterdir() if entry.name not in _NO_CLASSES]
    return entries[0] if _split_folder(unpacked) is None and len(entries) == 1 and entries[0].is_dir() else unpacked


def _split_folder(root: Path, *splits: str) -> Path | None:
    """Return the folder of a split, or of any; capital letters do not matter."""
    with os.scandir(root) as entries:
        # Names in small letters come last, and win.
        there = {entry.name.lower(): entry.name for entry in sorted(entries, key=lambda e: e.name) if entry.is_dir()}
    names = [name for split in splits or tuple(FOLDERS) for name in FOLDERS[split]]
    return next((root / there[name] for name in names if name in there), None)


def _class_folders(folder: Path) -> dict[str, Path]:
    """Return class folders by the names of the classes.

    Raises:
        DataError: two names that differ in their Unicode form only, or one that is not UTF-8.
    """
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and _is_shown(entry.name)]
    found: dict[str, Path] = {}
    for name in sorted(names):
        if (composed := normalize("NFC", name)) in found:
            raise DataError(
                f"{folder} has two folders {composed!r}, whose names differ in their Unicode form only: join them"
            )
        if not _is_utf8(name):
            raise DataError(f"{folder} has a class folder whose name is not UTF-8, {name!a}: rename it")
        found[composed] = folder / name
    return found


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_same_classes(root: Path, split: str) -> None:
    """Labels are ranks of class names, so one missing class would shift the labels of one split silently."""
    folders = {name: folder for name in FOLDERS if (folder := _split_folder(root, name))}
    classes = {name: set(_class_folders(folder)) for name, folder in folders.items()}
    for other, folder in folders.items():
        # An empty folder has an error of its own, which is raised when it is read.
        if not classes[split] or not (differing := sorted(classes[split] ^ classes[other])):
            continue
        if _ONE_FOLDER_FOR_ALL in (classes[split], classes[other]):
            where = folder if classes[other] == _ONE_FOLDER_FOR_ALL else folders[split]
            raise DataError(
                f"{where} has all images in one folder, images, as Tiny-ImageNet has: give each class a folder there, "
                "as in train (val_annotations.txt tells the classes); its folder test has no classes, move it away"
            )
        raise DataError(
            f"{root} has other classes for {split} than for {other} ({', '.join(differing[:3])}): "
            "give both the same class folders"
        )


def _has_images(folder: Path) -> bool:
    return next(_images_below(folder), None) is not None


def _images_below(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """Yield the images in a folder and in folders inside it, by name.

    Raises:
        DataError: there are pictures that are not read.
    """
    with os.scandir(folder) as entries:
        shown = sorted((entry for entry in entries if _is_shown(entry.name)), key=lambda entry: entry.name)
    for entry in shown:
        name = entry.name.lower()
        if name.endswith(IMAGE_SUFFIXES) and entry.is_file():
            yield entry
        elif name.endswith(OTHER_PICTURES) and entry.is_file():
            kinds = ", ".join(IMAGE_SUFFIXES)
            raise DataError(f"{printable(entry.path)} is not read: save it as one of {kinds}, or move it away")
        elif entry.is_dir(follow_symlinks=False):
            yield from _images_below(entry.path)


def _is_shown(name: str) -> bool:
    return name[0] != "." and name not in _NO_CLASSES


def printable(path: str) -> str:
    """Return a path for messages, which may not be UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace")
