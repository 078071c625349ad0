"""Claims: one process works on a part, and what a dead one left is taken over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qadtr_brevitas.reproduce.study import claims as module
from qadtr_brevitas.reproduce.study.claims import Claims


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leave(folder: Path, **facts: object) -> Path:
    """A claim as another process would leave it."""
    folder.mkdir(exist_ok=True)
    path = folder / "part.json"
    path.write_text(json.dumps({"token": "x", "host": "elsewhere", "pid": 1, "part": "train", **facts}))
    return path


def test_a_part_is_claimed_once_and_given_back(tmp_path: Path) -> None:
    claims = Claims(tmp_path / "claims")
    with claims.claim("part", "train") as first:
        assert first
        assert claims.owner("part") == f"process {os.getpid()} on {module.socket.gethostname()}"
        with claims.claim("part", "train") as second:
            assert not second
        with claims.claim("other", "train") as other:
            assert other
        # The one that did not get it did not give it back either.
        assert claims.owner("part")
    assert claims.owner("part") is None
    assert not list((tmp_path / "claims").iterdir())


def test_a_claim_is_given_back_after_an_error(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    with pytest.raises(KeyboardInterrupt), claims.claim("part", "train"):
        raise KeyboardInterrupt
    assert claims.owner("part") is None


def test_the_claim_of_a_dead_process_of_this_machine_is_taken_over_at_once(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    path = leave(tmp_path, host=module.socket.gethostname(), pid=dead_process())
    assert claims.owner("part") is None
    with claims.claim("part", "train") as mine:
        assert mine
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_a_claim_of_another_machine_lasts_as_long_as_it_is_touched(tmp_path: Path) -> None:
    claims = Claims(tmp_path, stale_after=60)
    path = leave(tmp_path)
    with claims.claim("part", "train") as mine:
        assert not mine
    assert claims.owner("part") == "process 1 on elsewhere"
    os.utime(path, (time.time() - 100, time.time() - 100))
    assert claims.owner("part") is None
    with claims.claim("part", "train") as mine:
        assert mine


def test_only_one_of_two_takes_over(tmp_path: Path) -> None:
    path = leave(tmp_path)
    os.utime(path, (0, 0))
    (tmp_path / "part.taking").write_text("{}")
    with Claims(tmp_path).claim("part", "train") as mine:
        assert not mine
    # Unless the one that began to take over died.
    os.utime(tmp_path / "part.taking", (0, 0))
    with Claims(tmp_path).claim("part", "train"):
        pass
    with Claims(tmp_path).claim("part", "train") as mine:
        assert mine


def test_the_owner_touches_its_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOUCH_EVERY", 0.01)
    with Claims(tmp_path).claim("part", "train"):
        os.utime(tmp_path / "part.json", (0, 0))
        for _ in range(500):
            if (tmp_path / "part.json").stat().st_mtime > 0:
                return
            time.sleep(0.01)
    pytest.fail("nobody touched the claim")
