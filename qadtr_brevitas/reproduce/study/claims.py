"""Who works on which part: one small file each in a folder that all processes see.

A claim is made by creating its file, which only one process can do. Its owner touches it as long as it works; a claim
that has not been touched for minutes, or whose process on this machine is gone, is taken over.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any
from uuid import uuid4

from qadtr_brevitas.core.files import write_atomically

TOUCH_EVERY = 15.0
STALE_AFTER = 300.0
"""Seconds; longer than the minute for which network file systems remember the times of files."""


@dataclass(frozen=True)
class Claims:
    """The claims of a folder.

    Args:
        folder: where they are; made if it is missing.
        stale_after: seconds without a touch after which a claim is anybody's.
    """

    folder: Path
    stale_after: float = STALE_AFTER

    @contextmanager
    def claim(self, key: str, what: str) -> Generator[bool]:
        """A block that has the claim to a part, or not; gives it back at the end.

        Args:
            key: the part.
            what: what it is, for the others to read.
        """
        path = self.folder / f"{key}.json"
        token = uuid4().hex
        if not self._take(path, _content(token, what)):
            yield False
            return
        done = Event()
        heart = Thread(target=_keep_alive, args=(path, done), daemon=True)
        heart.start()
        try:
            yield True
        finally:
            done.set()
            heart.join()
            if _read(path).get("token") == token:
                path.unlink(missing_ok=True)

    def owner(self, key: str) -> str | None:
        """Who works on a part, in words; None where no one does."""
        path = self.folder / f"{key}.json"
        content = _read(path)
        if not content or self._is_stale(path, content):
            return None
        return f"process {content['pid']} on {content['host']}"

    def _take(self, path: Path, content: dict[str, Any]) -> bool:
        self.folder.mkdir(parents=True, exist_ok=True)
        if _create(path, content):
            return True
        found = _read(path)
        if not self._is_stale(path, found):
            return False
        # One process at a time takes over: a second one would take the claim of the first for the stale one.
        lock = path.with_suffix(".taking")
        if not _create(lock, content):
            if self._age(lock) > self.stale_after:
                lock.unlink(missing_ok=True)
            return False
        try:
            if _read(path) != found or not self._is_stale(path, found):
                return False
            write_atomically(path, lambda new: new.write_text(json.dumps(content), encoding="utf-8"))
            return True
        finally:
            lock.unlink(missing_ok=True)

    def _is_stale(self, path: Path, content: dict[str, Any]) -> bool:
        if not path.exists():
            return True
        # A claim that is still empty is being written.
        is_here = content.get("host") == socket.gethostname()
        return (is_here and not _is_alive(int(content["pid"]))) or self._age(path) > self.stale_after

    def _age(self, path: Path) -> float:
        """Seconds since a file was touched, by the clock of the disk that holds it."""
        clock = self.folder / f".clock-{uuid4().hex[:8]}"
        try:
            clock.touch()
            return clock.stat().st_mtime - path.stat().st_mtime
        except FileNotFoundError:
            return 0.0
        finally:
            clock.unlink(missing_ok=True)


def _content(token: str, what: str) -> dict[str, Any]:
    return {"token": token, "host": socket.gethostname(), "pid": os.getpid(), "part": what}


def _create(path: Path, content: dict[str, Any]) -> bool:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(content))
    except FileExistsError:
        return False
    return True


def _read(path: Path) -> dict[str, Any]:
    """The claim; nothing where there is none, or one that is not yet written."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _keep_alive(path: Path, done: Event) -> None:
    while not done.wait(TOUCH_EVERY):
        with suppress(OSError):
            os.utime(path)
