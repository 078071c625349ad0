"""A lock for each step, so that two processes never run the same step.

The operating system holds it (`filelock`), and releases it when its process ends, however that happens.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from qadtr_brevitas.reproduce.study.steps import StudyStep

LOCKS_FOLDER = "locks"


@contextmanager
def step_lock(work: Path, step: StudyStep, *, waits: Callable[[], object] = lambda: None) -> Generator[None]:
    """Hold the lock of a step during a block; while another process holds it, wait.

    Args:
        work: the folder that studies share.
        step: the step.
        waits: called before waiting.
    """
    file = work / LOCKS_FOLDER / f"{step.key}.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        waits()
        lock.acquire(poll_interval=1.0)
    try:
        yield
    finally:
        lock.release()
