"""Data sets that come as a tar: unpacked once, safely, into the cache folder."""

import os
import shutil
import tarfile
import zlib
from hashlib import blake2b
from pathlib import Path
from tempfile import mkdtemp

from qadtr_brevitas.data.places import cache_folder
from qadtr_brevitas.errors import DataError


def unpack(archive: Path) -> Path:
    """Unpacks a tar the first time it is asked for, and returns the folder every time.

    Two processes may do it at once: each unpacks into a folder of its own, and the first to finish names the result.

    Raises:
        DataError: not a tar, a damaged one, one with paths that lead outside, or no space for it.
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
            _name(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{archive} is no tar or is damaged ({_first_line(error)}): fetch it again") from error
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"cannot unpack {archive} into {target.parent}: {reason}; free some space, or set XDG_CACHE_HOME"
        ) from error
    return target


def _check_end(tar: tarfile.TarFile) -> None:
    """Extraction stops without a word at a damaged header; a whole tar ends with a block of zeros there."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("it ends too early")


def _name(temporary: Path, target: Path) -> None:
    try:
        os.rename(temporary, target)
    except OSError:
        if not target.is_dir():
            raise


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
