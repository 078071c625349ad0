"""Locks of steps: small files in a folder that all processes see, so that two processes never run the same step.

A process takes a lock by creating its file, which only one process can do. It touches the file as long as it works. A
lock that has not been touched for minutes, or whose process on this machine has died, can be taken over.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from uuid import uuid4

from pydantic import ValidationError

from qadtr_brevitas.core.document import Document
from qadtr_brevitas.core.files import write_atomically

TOUCH_SECONDS = 15.0
STALE_SECONDS = 300.0
"""Longer than the minute for which network file systems cache the times of files."""


class LockContent(Document):
    """The contents of a lock file: who holds the lock, and for which step."""

    token: str
    host: str
    pid: int
    part: str


@dataclass(frozen=True)
class StepLocks:
    """The lock files of a folder.

    Args:
        folder: the folder; made if it is missing.
        stale_seconds: seconds without a touch after which a lock can be taken over.
    """

    folder: Path
    stale_seconds: float = STALE_SECONDS

    @contextmanager
    def lock(self, key: str, step: str) -> Generator[bool]:
        """Try to hold the lock of a step during a block, which receives whether that succeeded.

        Args:
            key: key of the step.
            step: its name, for people who read the file.
        """
        path = self._path(key)
        content = LockContent(token=uuid4().hex, host=socket.gethostname(), pid=os.getpid(), part=step)
        if not self._take(path, content):
            yield False
            return
        finished = Event()
        toucher = Thread(target=_touch_until, args=(path, finished), daemon=True)
        toucher.start()
        try:
            yield True
        finally:
            finished.set()
            toucher.join()
            found = _read(path)
            if found and found.token == content.token:
                path.unlink(missing_ok=True)

    def owner(self, key: str) -> str | None:
        """Return the process that holds the lock of a step, as text; None if no process does."""
        path = self._path(key)
        content = _read(path)
        if content is None or self._is_stale(path, content):
            return None
        return f"process {content.pid} on {content.host}"

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def _take(self, path: Path, content: LockContent) -> bool:
        self.folder.mkdir(parents=True, exist_ok=True)
        if _create(path, content):
            return True
        found = _read(path)
        if not self._is_stale(path, found):
            return False
        # One process at a time takes over: a second one could mistake the new lock of the first for the stale one.
        takeover = path.with_suffix(".taking")
        if not _create(takeover, content):
            if self._age(takeover) > self.stale_seconds:
                takeover.unlink(missing_ok=True)
            return False
        try:
            if _read(path) != found or not self._is_stale(path, found):
                return False
            write_atomically(path, lambda new: new.write_text(content.model_dump_json(), encoding="utf-8"))
            return True
        finally:
            takeover.unlink(missing_ok=True)

    def _is_stale(self, path: Path, content: LockContent | None) -> bool:
        if not path.exists():
            return True
        if content is not None and content.host == socket.gethostname() and not _is_alive(content.pid):
            return True
        # A lock without contents is being written, and counts by its age.
        return self._age(path) > self.stale_seconds

    def _age(self, path: Path) -> float:
        """Return the seconds since a file was touched, by the clock of the disk that holds it."""
        clock = self.folder / f".clock-{uuid4().hex[:8]}"
        try:
            clock.touch()
            return clock.stat().st_mtime - path.stat().st_mtime
        except FileNotFoundError:
            return 0.0
        finally:
            clock.unlink(missing_ok=True)


def _create(path: Path, content: LockContent) -> bool:
    """Create a file that does not exist yet, and return whether that succeeded."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(content.model_dump_json())
    except FileExistsError:
        return False
    return True


def _read(path: Path) -> LockContent | None:
    """Return the contents of a lock file; None if there is no file, or it is not complete yet."""
    try:
        return LockContent.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        return None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _touch_until(path: Path, finished: Event) -> None:
    while not finished.wait(TOUCH_SECONDS):
        with suppress(OSError):
            os.utime(path)
