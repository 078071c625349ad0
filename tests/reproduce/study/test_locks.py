"""Locks: one process runs a step, and the lock of a dead process is taken over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qadtr_brevitas.reproduce.study import locks as module
from qadtr_brevitas.reproduce.study.locks import StepLocks


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def write_lock(folder: Path, **changes: object) -> Path:
    """Write a lock as another process would leave it."""
    folder.mkdir(exist_ok=True)
    path = folder / "step.json"
    path.write_text(json.dumps({"token": "x", "host": "elsewhere", "pid": 1, "part": "train", **changes}))
    return path


def test_a_lock_is_held_once_and_released_after_the_block(tmp_path: Path) -> None:
    locks = StepLocks(tmp_path / "locks")
    with locks.lock("step", "train") as first:
        assert first
        assert locks.owner("step") == f"process {os.getpid()} on {module.socket.gethostname()}"
        with locks.lock("step", "train") as second:
            assert not second
        with locks.lock("other", "train") as other:
            assert other
        # A block without the lock does not release it.
        assert locks.owner("step")
    assert locks.owner("step") is None
    assert not list((tmp_path / "locks").iterdir())


def test_a_lock_is_released_after_an_error(tmp_path: Path) -> None:
    locks = StepLocks(tmp_path)
    with pytest.raises(KeyboardInterrupt), locks.lock("step", "train"):
        raise KeyboardInterrupt
    assert locks.owner("step") is None


def test_the_lock_of_a_dead_process_of_this_machine_is_taken_over_at_once(tmp_path: Path) -> None:
    locks = StepLocks(tmp_path)
    path = write_lock(tmp_path, host=module.socket.gethostname(), pid=dead_process())
    assert locks.owner("step") is None
    with locks.lock("step", "train") as is_locked:
        assert is_locked
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_a_lock_of_another_machine_lasts_as_long_as_it_is_touched(tmp_path: Path) -> None:
    locks = StepLocks(tmp_path, stale_seconds=60)
    path = write_lock(tmp_path)
    with locks.lock("step", "train") as is_locked:
        assert not is_locked
    assert locks.owner("step") == "process 1 on elsewhere"
    os.utime(path, (time.time() - 100, time.time() - 100))
    assert locks.owner("step") is None
    with locks.lock("step", "train") as is_locked:
        assert is_locked


def test_only_one_of_two_processes_takes_over(tmp_path: Path) -> None:
    path = write_lock(tmp_path)
    os.utime(path, (0, 0))
    (tmp_path / "step.taking").write_text("{}")
    with StepLocks(tmp_path).lock("step", "train") as is_locked:
        assert not is_locked
    # The other process died while it was taking over.
    os.utime(tmp_path / "step.taking", (0, 0))
    with StepLocks(tmp_path).lock("step", "train"):
        pass
    with StepLocks(tmp_path).lock("step", "train") as is_locked:
        assert is_locked


def test_an_empty_lock_is_being_written_and_counts_by_its_age(tmp_path: Path) -> None:
    path = write_lock(tmp_path)
    path.write_text("")
    with StepLocks(tmp_path).lock("step", "train") as is_locked:
        assert not is_locked
    os.utime(path, (0, 0))
    with StepLocks(tmp_path).lock("step", "train") as is_locked:
        assert is_locked


def test_the_owner_touches_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOUCH_SECONDS", 0.01)
    with StepLocks(tmp_path).lock("step", "train"):
        os.utime(tmp_path / "step.json", (0, 0))
        for _ in range(500):
            if (tmp_path / "step.json").stat().st_mtime > 0:
                return
            time.sleep(0.01)
    pytest.fail("nobody touched the lock")
