"""Write files completely or not at all, read JSON, and compute fingerprints of contents.

A file is written under a temporary name and renamed, so that a crash or a full disk never leaves half a file.
Fingerprints tell models, patches and data sets apart, whatever their files are called.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from qadtr_brevitas.core.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

_SHOWN = 3
# torch.save and safetensors report a failed write with these words instead of an OSError.
_WRITE_FAILURES = ("PytorchStreamWriter", "unexpected pos", "I/O error", "IoError")

_DIGEST_BYTES = 16
_CHUNK_BYTES = 1 << 20


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write the file `path` completely or not at all; an earlier file stays until the new one is on disk.

    Args:
        path: the file to write or replace; its folder is created if it is missing.
        write: called with a temporary path of the same suffix, to which it writes the whole file.

    Raises:
        CheckpointError: the disk is full, the folder cannot be written, or `path` is a folder.
    """
    temporary = path.with_name(f".{uuid4().hex[:8]}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except Exception as error:
        _raise_if_not_written(path, error)
        raise
    finally:
        _remove(temporary)


def replace_directory(path: Path, fill: Callable[[Path], object]) -> None:
    """Write the folder `path` with exactly what `fill` writes into the empty folder that it is called with.

    An earlier folder stays until the new one is complete. Two renames are needed to exchange folders;
    `recover_directory`, which is called here first, repairs the result of a crash between them.

    Raises:
        CheckpointError: the disk is full, the folder cannot be written, or `path` is a file.
        UsageError: `path` is the current folder or one above it.
    """
    if path.name in ("", ".."):
        raise UsageError(f"{path} is the current folder or one above it: give another, for instance {path / 'new'}")
    new, old = _beside(path)
    try:
        recover_directory(path)
        if path.exists() and not path.is_dir():
            raise NotADirectoryError("a file of that name is in the way")
        _remove(new)
        new.mkdir(parents=True)
        fill(new)
        for file in sorted(new.rglob("*")):
            _sync(file)
        _sync(new)
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
        _sync(path.parent)
    # Ctrl-C and SIGTERM are no Exception.
    except BaseException as error:
        recover_directory(path)
        _remove(new)
        _raise_if_not_written(path, error)
        raise
    _remove(old)


def check_replaceable(path: Path, own: Collection[str], *, advice: str) -> None:
    """Refuse to replace a folder that holds more than what a command writes; a missing one may be made.

    Args:
        path: the folder.
        own: names of the files that may be there, as paths in the folder with slashes.
        advice: what to do where the folder is wanted for something else, an imperative.

    Raises:
        UsageError: something else is there, which would be lost.
    """
    if not path.is_dir():
        return
    files = (file for file in path.rglob("*") if file.is_symlink() or not file.is_dir())
    foreign = (name for file in files if (name := file.relative_to(path).as_posix()) not in own)
    if shown := list(islice(foreign, _SHOWN + 1)):
        names = ", ".join(shown[:_SHOWN]) + (", ..." if len(shown) > _SHOWN else "")
        raise UsageError(f"{path} is not replaced: it holds more than would be written again ({names}): {advice}")


def recover_directory(path: Path) -> None:
    """Finish a `replace_directory` that was interrupted between its two renames; otherwise do nothing."""
    new, old = _beside(path)
    if old.exists() and not path.exists():
        # The old folder only moves aside once the new one is complete.
        os.replace(new if new.exists() else old, path)
    _remove(old)


def write_json(path: Path, data: Any) -> None:
    """Write `data` as indented JSON, atomically.

    Raises:
        CheckpointError: as in `write_atomically`.
        ValueError: `data` holds NaN or an infinity, which JSON cannot express.
    """
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: the file is missing, cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; check the path") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged or not JSON ({error}); write it again") from error


def _beside(path: Path) -> tuple[Path, Path]:
    """Return the paths of the new and the old folder during an exchange."""
    return path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")


def _raise_if_not_written(path: Path, error: BaseException) -> None:
    """Raise a CheckpointError if an error is a failed write; other errors are left to the caller."""
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
    elif any(words in str(error) for words in _WRITE_FAILURES):
        reason = "the disk may be full"
    else:
        return
    raise CheckpointError(
        f"cannot write {path}: {reason}; what was there is unchanged. Free some space or choose another --output"
    ) from error


def _sync(path: Path) -> None:
    """Wait until the file or folder is on disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a file or folder if possible; a failure here must not hide the error that is being handled."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def fingerprint_file(path: Path, *, facts: Any = None) -> str:
    """Return 32 hex digits of a file's bytes and, if given, of JSON-like facts that change what the file means."""
    digest = blake2b(digest_size=_DIGEST_BYTES)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    if facts is not None:
        digest.update(_canonical(facts))
    return digest.hexdigest()


def fingerprint_bytes(content: bytes, *, facts: Any = None) -> str:
    """Return what `fingerprint_file` returns for a file of this content."""
    digest = blake2b(content, digest_size=_DIGEST_BYTES)
    if facts is not None:
        digest.update(_canonical(facts))
    return digest.hexdigest()


def fingerprint_tensors(tensors: Iterable[Tensor], *, facts: Any = None) -> str:
    """Return 32 hex digits of the types, shapes and values of tensors and, if given, of JSON-like facts."""
    digest = blake2b(digest_size=_DIGEST_BYTES)
    for tensor in tensors:
        array = tensor.detach().cpu().contiguous().numpy()
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.data)
    if facts is not None:
        digest.update(_canonical(facts))
    return digest.hexdigest()


def fingerprint_facts(facts: Any) -> str:
    """Return 32 hex digits of JSON-like facts; the order of keys does not matter."""
    return blake2b(_canonical(facts), digest_size=_DIGEST_BYTES).hexdigest()


def _canonical(facts: Any) -> bytes:
    return json.dumps(facts, sort_keys=True, separators=(",", ":"), default=str).encode()
