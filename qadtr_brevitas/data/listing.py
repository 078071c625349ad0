"""Find the images of a data set: in a folder ROOT/<split>/<class>/ or ROOT/<class>/, or in a tar of such a folder.

A tar is unpacked once, into the cache folder.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from tempfile import mkdtemp

from qadtr_brevitas.core.errors import DataError
from qadtr_brevitas.data.split import check_split

DATA_VARIABLE = "QADTR_BREVITAS_DATA"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FOLDERS = {"train": ("train",), "test": ("test", "val")}
# macOS adds this folder to archives.
_NO_CLASSES = ("__MACOSX",)
LAYOUT = "ROOT/{train,test}/<class>/<image>"


def data_folder() -> Path | None:
    """Return the folder that the environment variable QADTR_BREVITAS_DATA names, or None if it is not set."""
    value = os.environ.get(DATA_VARIABLE)
    return Path(value).expanduser() if value else None


def cache_folder() -> Path:
    """Return the folder for files that can be recreated: $XDG_CACHE_HOME (or ~/.cache) + /qadtr_brevitas."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "qadtr_brevitas"


def unpack(archive: Path) -> Path:
    """Unpack a tar into the cache folder, unless it is there already, and return the folder of its contents.

    Two processes may unpack at once: each writes to a temporary folder, and the first to finish renames it.

    Raises:
        DataError: the file is not a tar, is damaged or holds paths that lead outside, or there is no space for it.
    """
    stat = archive.stat()
    key = blake2b(f"{archive.resolve()}/{stat.st_size}/{stat.st_mtime_ns}".encode(), digest_size=6).hexdigest()
    target = cache_folder() / "unpacked" / f"{archive.stem}-{key}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(mkdtemp(prefix=f".{archive.stem}-", dir=target.parent))
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(temporary, filter="data")
                _check_end(tar)
            _rename(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{archive} is not a tar or is damaged ({_first_line(error)}): fetch it again") from error
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"cannot unpack {archive} into {target.parent}: {reason}; free some space, or set XDG_CACHE_HOME"
        ) from error
    return target


def _check_end(tar: tarfile.TarFile) -> None:
    """Raise if a tar is cut off: extraction stops silently at a damaged header, and a whole tar ends with zeros."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("it ends too early")


def _rename(temporary: Path, target: Path) -> None:
    try:
        os.rename(temporary, target)
    except OSError:
        if not target.is_dir():
            raise


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class Listing:
    """The images of one split, by class and then by name.

    Args:
        folder: the folder that holds the class folders.
        classes: names of the class folders, sorted.
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

    def pick(self, indices: Sequence[int], *, part: str) -> Listing:
        """Return some of the images only; `classes` stays whole, so labels keep their meaning."""
        return replace(
            self,
            paths=tuple(self.paths[index] for index in indices),
            labels=tuple(self.labels[index] for index in indices),
            part=f"{self.part} {part}".lstrip(),
        )


def find_root(root: str | None, *, name: str | None = None) -> Path:
    """Return the folder that holds the splits.

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
    return found if found.is_dir() else _content_folder(unpack(found))


def list_images(root: Path, split: str, *, holdout: int | None = None) -> Listing:
    """List the images of one split.

    Args:
        root: holds the folders of the splits; or only one of them, or the class folders themselves.
        split: "train" or "test".
        holdout: where all images are in one place, the first of every so many is for testing and the others are for
            training. None where there is a folder for each.

    Raises:
        UsageError: a split other than "train" and "test".
        DataError: no such split, no class folders, a class without images, splits whose classes differ, or a holdout
            where there are two splits or none where it is needed.
    """
    check_split(split)
    folder = _split_folder(root, split)
    if holdout is None:
        if folder is None:
            raise _no_split(root, split)
        _check_same_classes(root, split)
        return _list_folder(folder)
    folders = [found for name in FOLDERS if (found := _split_folder(root, name))]
    if len(folders) == 2:
        both = " and ".join(path.name for path in folders)
        raise DataError(
            f"{root} has {both} folders, so data.dataset.holdout={holdout} would leave images out: set it to null"
        )
    listing = _list_folder(folders[0] if folders else root)
    indices = [index for index in range(len(listing.paths)) if (index % holdout == 0) == (split == "test")]
    return listing.pick(indices, part=f"{split} of holdout {holdout}")


def _no_split(root: Path, split: str) -> DataError:
    wanted = " or ".join(FOLDERS[split])
    other = _split_folder(root)
    if other is None and not any(_has_images(root / name) for name in _class_names(root)):
        return DataError(f"{root} has no folder {wanted}: images must lie in {LAYOUT}")
    there = f"only {other.name}" if other else "class folders at once"
    return DataError(
        f"{root} has no folder {wanted}, {there}: set data.dataset.holdout=5 to test on every fifth image there is and "
        "train on the others"
    )


def _list_folder(folder: Path) -> Listing:
    """All images below class folders."""
    classes = _class_names(folder)
    if not classes:
        raise DataError(f"{folder} is empty: images must lie in {LAYOUT}")
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


def _content_folder(unpacked: Path) -> Path:
    """Return the one folder that holds everything in an unpacked tar, or the top."""
    entries = list(unpacked.iterdir())
    return entries[0] if _split_folder(unpacked) is None and len(entries) == 1 and entries[0].is_dir() else unpacked


def _split_folder(root: Path, *splits: str) -> Path | None:
    names = [name for split in splits or tuple(FOLDERS) for name in FOLDERS[split]]
    return next((root / name for name in names if (root / name).is_dir()), None)


def _class_names(folder: Path) -> tuple[str, ...]:
    names = (entry.name for entry in os.scandir(folder) if entry.is_dir())
    return tuple(sorted(name for name in names if name[0] != "." and name not in _NO_CLASSES))


def _check_same_classes(root: Path, split: str) -> None:
    """Labels are ranks of class names, so one missing class would shift the labels of one split silently."""
    folders = {name: folder for name in FOLDERS if (folder := _split_folder(root, name))}
    classes = {name: set(_class_names(folder)) for name, folder in folders.items()}
    for other in classes:
        # An empty folder has an error of its own, which is raised when it is read.
        if classes[split] and (differing := sorted(classes[split] ^ classes[other])):
            raise DataError(
                f"{root} has other classes for {split} than for {other} ({', '.join(differing[:3])}): "
                "give both the same class folders"
            )


def _has_images(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(map(_is_image, entries))


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.name[0] != "." and entry.is_file()
