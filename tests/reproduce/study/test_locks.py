"""Locks: one process runs a step, and the lock of a killed process is free."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

import pytest

from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.reproduce.study.locks import step_lock
from qadtr_brevitas.reproduce.study.resources import StudyResources
from qadtr_brevitas.reproduce.study.steps import StudyStep

_HOLDER = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(300)
"""


@dataclass(frozen=True)
class EmptyStep(StudyStep):
    def execute(self, resources: StudyResources, progress: Progress) -> None:
        """Do nothing."""


@pytest.fixture
def step(tmp_path: Path) -> EmptyStep:
    return EmptyStep("train", tmp_path / "step", 1, ())


class Waiter:
    """A thread that takes the lock of a step.

    Attributes:
        waits: whether it had to wait.
        held: whether it has held the lock.
    """

    def __init__(self, work: Path, step: StudyStep) -> None:
        self.waits, self.held = Event(), Event()
        self._thread = Thread(target=self._take, args=(work, step), daemon=True)
        self._thread.start()

    def _take(self, work: Path, step: StudyStep) -> None:
        with step_lock(work, step, waits=self.waits.set):
            self.held.set()


def test_a_lock_is_held_once_and_waited_for(tmp_path: Path, step: EmptyStep) -> None:
    with step_lock(tmp_path, step):
        waiter = Waiter(tmp_path, step)
        assert waiter.waits.wait(20)
        assert not waiter.held.is_set()
    assert waiter.held.wait(20)


def test_a_free_lock_is_not_waited_for(tmp_path: Path, step: EmptyStep) -> None:
    with step_lock(tmp_path, EmptyStep("other", tmp_path / "other", 2, ())):
        waiter = Waiter(tmp_path, step)
        assert waiter.held.wait(20)
    assert not waiter.waits.is_set()


def test_a_lock_is_released_after_an_error(tmp_path: Path, step: EmptyStep) -> None:
    with pytest.raises(KeyboardInterrupt), step_lock(tmp_path, step):
        raise KeyboardInterrupt
    assert Waiter(tmp_path, step).held.wait(20)


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path, step: EmptyStep) -> None:
    with step_lock(tmp_path, step):
        pass
    (file,) = (tmp_path / "locks").iterdir()
    with subprocess.Popen([sys.executable, "-c", _HOLDER, str(file)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        waiter = Waiter(tmp_path, step)
        assert waiter.waits.wait(20)
        assert not waiter.held.is_set()
        holder.kill()
    assert waiter.held.wait(20)
