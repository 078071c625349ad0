"""Folders of data and caches, and archives of data, which are unpacked once into the cache folder."""

from __future__ import annotations

import logging
import os
import shutil
import tarfile
import zipfile
import zlib
from hashlib import blake2b
from pathlib import Path
from tempfile import mkdtemp

from qadtr_brevitas.core.errors import DataError

logger = logging.getLogger(__name__)

DATA_VARIABLE = "QADTR_BREVITAS_DATA"
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".zip")


def data_folder() -> Path | None:
    """Return the folder that the environment variable QADTR_BREVITAS_DATA names, or None if it is not set."""
    value = os.environ.get(DATA_VARIABLE)
    return Path(value).expanduser() if value else None


def cache_folder() -> Path:
    """Return the folder for files that can be recreated: $XDG_CACHE_HOME (or ~/.cache) + /qadtr_brevitas."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "qadtr_brevitas"


def unpack(archive: Path) -> Path:
    """Unpack a tar or zip into the cache folder, unless it is there already, and return the folder of its contents.

    Two processes may unpack at once: each writes to a temporary folder, and the first to finish renames it.

    Raises:
        DataError: the file is not a tar or zip, is damaged or holds paths that lead outside, or the disk is full.
    """
    stat = archive.stat()
    content = os.fsencode(f"{archive.resolve()}/{stat.st_size}/{stat.st_mtime_ns}")
    key = blake2b(content, digest_size=6).hexdigest()
    target = cache_folder() / "unpacked" / f"{archive.stem}-{key}"
    if target.is_dir():
        return target
    logger.info("unpacking %s (%.0f MB) once, into %s", archive, stat.st_size / 1e6, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(mkdtemp(prefix=f".{archive.stem}-", dir=target.parent))
        try:
            _extract(archive, temporary)
            _rename(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    # An encrypted zip is a RuntimeError, one compressed in an unknown way a NotImplementedError.
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, RuntimeError) as error:
        reason = _first_line(error)
        raise DataError(f"{archive} is not a tar or zip, or is damaged ({reason}): fetch it again") from error
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"cannot unpack {archive} into {target.parent}: {reason}; free some space, or set XDG_CACHE_HOME"
        ) from error
    return target


def _extract(archive: Path, folder: Path) -> None:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            # Paths that lead outside are made to lead inside.
            packed.extractall(folder)
        return
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
        check_end(tar)


def check_end(tar: tarfile.TarFile) -> None:
    """Raise if a tar is cut off, once it was read to its end.

    Reading stops silently at a damaged header, and a whole tar ends with zeros.

    Raises:
        ReadError: of tarfile; the tar is cut off.
    """
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
