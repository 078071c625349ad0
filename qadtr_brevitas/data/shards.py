"""Shards in the form of webdataset: tars of samples, each a picture and its class, read at any place.

The tars are listed once and their pictures are found by offset, so that epochs, resumed runs and any number of workers
work as with files; a listing is kept in the cache folder. Nothing is unpacked.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Self

import numpy

from qadtr_brevitas.core.errors import DataError, QadtrError
from qadtr_brevitas.core.files import write_atomically
from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.data.archives import cache_folder, check_end
from qadtr_brevitas.data.listing import FOLDERS, IMAGE_SUFFIXES, Pictures
from qadtr_brevitas.data.picture_set import PictureSet
from qadtr_brevitas.data.shard_names import check_none_is_missing
from qadtr_brevitas.data.split import check_split, numbered

_CLASS_SUFFIXES = (".cls", ".json")
_CLASS_KEYS = ("label", "cls", "class", "target")
LAYOUT = "ROOT/{train,val}/*.tar, or ROOT/*train*.tar and ROOT/*val*.tar"


@dataclass(frozen=True)
class Shards(Pictures):
    """The samples of some tars, in the order that they lie in.

    Args:
        folder: where the tars lie.
        classes: names of the classes.
        tars: paths.
        keys: name of each sample inside its tar.
        labels: class of each sample.
        places: int64 (N, 3), of each picture the index of its tar, its offset there and its length in bytes.
        digest: changes whenever a tar is added, removed, renamed or rewritten.
        part: which of the samples these are; "" for all.
    """

    folder: Path
    classes: tuple[str, ...]
    tars: tuple[str, ...]
    keys: tuple[str, ...]
    labels: tuple[int, ...]
    places: numpy.ndarray[Any, numpy.dtype[numpy.int64]]
    digest: str
    part: str = ""

    def name(self, index: int) -> str:
        return f"{self.keys[index]} in {self.tars[self.places[index, 0]]}"

    def read(self, index: int) -> bytes:
        tar, offset, size = self.places[index].tolist()
        with open(self.tars[tar], "rb") as file:
            file.seek(offset)
            return file.read(size)

    def pick(self, indices: Sequence[int], *, part: str) -> Self:
        return replace(
            self,
            keys=tuple(self.keys[index] for index in indices),
            labels=tuple(self.labels[index] for index in indices),
            places=self.places[list(indices)],
            part=f"{self.part} {part}".lstrip(),
        )


@plugin
class ShardFolder(PictureSet):
    """Pictures in tars, as webdataset writes them: NAME.jpg and NAME.cls (or NAME.json with `label`) for each sample.

    Tars of a split lie in a folder of its name, or have the name in their own: ROOT/train/*.tar, ROOT/x-train-0000.tar.
    They have to lie on a disk of this machine or one that it sees.
    """

    classes: Annotated[int, Field(ge=2, description="number of classes; labels are below it")] = 1000
    class_names: Annotated[
        str | None, Field(description="text file with a class name on each line; null: the numbers")
    ] = None
    expected_shards: Annotated[
        int | None, Field(ge=1, description="refuse a training split of another number of tars; null: any number")
    ] = None
    first_shard: Annotated[
        int | None, Field(ge=0, description="number in the name of each split's first tar; null: any number")
    ] = 0

    def list_pictures(self, split: str) -> Shards:
        """Return all samples of one split.

        Raises:
            UsageError: the split has another name.
            DataError: there are no tars, a number is missing in their names, a tar is damaged, or a label is wrong.
        """
        check_split(split)
        root = Path(self.root or os.environ.get("QADTR_BREVITAS_DATA", "")).expanduser()
        tars = _tars_of(root, split)
        check_none_is_missing(tars, self.expected_shards if split == "train" else None, self.first_shard)
        names = numbered(self.classes) if self.class_names is None else _read_names(self.class_names, self.classes)
        digest, found = blake2b(digest_size=8), [_listed(tar) for tar in tars]
        places: list[tuple[int, int, int]] = []
        keys, labels = [], []
        for number, (tar, samples) in enumerate(zip(tars, found, strict=True)):
            digest.update(os.fsencode(f"{tar.name}/{tar.stat().st_size}/{tar.stat().st_mtime_ns}\n"))
            for key, label, offset, size in samples:
                if not 0 <= label < self.classes:
                    raise DataError(
                        f"{key} in {tar} has the class {label}, but there are the classes 0 to {self.classes - 1}: set "
                        "data.dataset.classes"
                    )
                keys.append(key)
                labels.append(label)
                places.append((number, offset, size))
        return Shards(
            root,
            names,
            tuple(map(str, tars)),
            tuple(keys),
            tuple(labels),
            numpy.array(places, dtype=numpy.int64),
            digest.hexdigest(),
            split,
        )


def _tars_of(root: Path, split: str) -> list[Path]:
    if not root.is_dir():
        raise DataError(f"there is no folder {root}: set data.dataset.root to a folder that holds {LAYOUT}")
    for name in FOLDERS[split]:
        if found := sorted((root / name).glob("*.tar")) or sorted(root.glob(f"*{name}*.tar")):
            return found
    raise DataError(f"{root} has no shards for {split}: it must hold {LAYOUT}")


def _listed(tar: Path) -> list[tuple[str, int, int, int]]:
    """Return key, label, offset and length of each sample, listed anew or as an earlier call has kept them."""
    stat = tar.stat()
    name = blake2b(os.fsencode(f"{tar.resolve()}/{stat.st_size}/{stat.st_mtime_ns}"), digest_size=8).hexdigest()
    cache = cache_folder() / "shards" / f"{name}.json"
    try:
        return [(str(key), int(label), int(at), int(size)) for key, label, at, size in json.loads(cache.read_bytes())]
    except (OSError, ValueError, TypeError):
        samples = list(_samples(tar))
    try:
        write_atomically(cache, lambda path: path.write_text(json.dumps(samples), encoding="utf-8"))
    except (OSError, QadtrError):
        # Without it the tar is listed again next time.
        return samples
    return samples


def _samples(tar: Path) -> Iterator[tuple[str, int, int, int]]:
    pictures: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(tar) as members:
            for member in members:
                folder, _, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                key, suffix = f"{folder}/{stem}".lstrip("/"), f".{suffix.lower()}"
                if not member.isfile() or file.startswith("."):
                    continue
                if suffix.endswith(IMAGE_SUFFIXES) and key not in pictures:
                    pictures[key] = (member.offset_data, member.size)
                elif suffix in _CLASS_SUFFIXES and key not in labels:
                    content = members.extractfile(member)
                    assert content is not None
                    labels[key] = _label(content.read(), suffix, key, tar)
            check_end(members)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"the shard {tar} cannot be read ({error}): fetch it again") from error
    last = max((offset + size for offset, size in pictures.values()), default=0)
    if last > tar.stat().st_size:
        raise DataError(f"the shard {tar} is cut off after {tar.stat().st_size} bytes: fetch it again")
    for key, (offset, size) in pictures.items():
        if key not in labels:
            raise DataError(f"{key} in {tar} has a picture and no class: write {key}.cls beside it")
        yield key, labels[key], offset, size


def _label(content: bytes, suffix: str, key: str, tar: Path) -> int:
    try:
        value: Any = json.loads(content)
        if isinstance(value, dict):
            value = next(value[name] for name in _CLASS_KEYS if name in value)
        if type(value) is int:
            return value
    except (ValueError, StopIteration):
        pass
    raise DataError(
        f"{key}{suffix} in {tar} holds no class: write its number, or JSON with one of {', '.join(_CLASS_KEYS)}"
    )


def _read_names(file: str, count: int) -> tuple[str, ...]:
    try:
        names = tuple(Path(file).expanduser().read_text(encoding="utf-8").split("\n")[:count])
    except OSError as error:
        raise DataError(f"cannot read the class names {file} ({error}): set data.dataset.class_names") from error
    if len(names) != count or not all(names):
        raise DataError(f"{file} has {len(names)} class names, but data.dataset.classes is {count}")
    return names
