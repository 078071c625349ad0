"""Which images lie in a folder ROOT/<split>/<class>/, and where such a folder is."""

import os
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from qadtr_brevitas.data.archive import unpack
from qadtr_brevitas.data.places import DATA_VARIABLE, data_folder
from qadtr_brevitas.data.split_names import check_split
from qadtr_brevitas.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FOLDERS = {"train": ("train",), "test": ("test", "val")}
LAYOUT = "ROOT/{train,test}/<class>/<image>"


@dataclass(frozen=True)
class Listing:
    """The images of one split, by class and then by name.

    Args:
        folder: the folder that holds the class folders.
        classes: names of the class folders, sorted.
        paths: image files.
        labels: index of each file's class.
        digest: changes whenever a file is added, removed, renamed or rewritten.
    """

    folder: Path
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    digest: str


def find_root(root: str | None, *, name: str | None = None) -> Path:
    """The folder that holds the splits.

    Args:
        root: a folder or a tar; None for the folder that QADTR_BREVITAS_DATA names.
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
    inner = [base / name, base / f"{name}.tar"] if name and base.is_dir() and _split_folder(base) is None else []
    found = next((path for path in inner if path.exists()), base)
    return found if found.is_dir() else _inside(unpack(found))


def list_images(root: Path, split: str) -> Listing:
    """Lists the images of one split.

    Raises:
        UsageError: a split other than "train" and "test".
        DataError: no such split, no class folders, a class without images, or splits whose classes differ.
    """
    check_split(split)
    folder = _split_folder(root, split)
    if folder is None:
        wanted = " or ".join(FOLDERS[split])
        raise DataError(f"{root} has no folder {wanted}: images must lie in {LAYOUT}")
    classes = _class_names(folder)
    if not classes:
        raise DataError(f"{folder} is empty: images must lie in {LAYOUT}")
    _check_same_classes(root, split, classes)
    paths: list[str] = []
    labels: list[int] = []
    digest = blake2b(digest_size=8)
    for label, name in enumerate(classes):
        entries = sorted(
            (entry for entry in os.scandir(folder / name) if _is_image(entry)), key=lambda entry: entry.name
        )
        if not entries:
            raise DataError(
                f"{folder / name} has no images ({', '.join(IMAGE_SUFFIXES)}): add some or delete the folder"
            )
        for entry in entries:
            stat = entry.stat()
            digest.update(f"{name}/{entry.name}/{stat.st_size}/{stat.st_mtime_ns}\n".encode())
        paths += [entry.path for entry in entries]
        labels += [label] * len(entries)
    return Listing(folder, classes, tuple(paths), tuple(labels), digest.hexdigest())


def _inside(unpacked: Path) -> Path:
    """A tar usually holds one folder that holds everything."""
    entries = list(unpacked.iterdir())
    return entries[0] if _split_folder(unpacked) is None and len(entries) == 1 and entries[0].is_dir() else unpacked


def _split_folder(root: Path, *splits: str) -> Path | None:
    names = [name for split in splits or tuple(FOLDERS) for name in FOLDERS[split]]
    return next((root / name for name in names if (root / name).is_dir()), None)


def _class_names(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."))


def _check_same_classes(root: Path, split: str, classes: tuple[str, ...]) -> None:
    """Labels are ranks of class names, so one missing class would shift the labels of one split silently."""
    for other in FOLDERS:
        folder = _split_folder(root, other)
        if other == split or folder is None:
            continue
        if differing := sorted(set(classes) ^ set(_class_names(folder))):
            raise DataError(
                f"{root} has other classes for {split} than for {other} ({', '.join(differing[:3])}): "
                "give both the same class folders"
            )


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.name[0] != "." and entry.is_file()
