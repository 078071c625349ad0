"""Steps of a study in several processes of one machine."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pytest

from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.reproduce.study import jobs
from qadtr_brevitas.reproduce.study.jobs import helping_processes
from qadtr_brevitas.reproduce.study.locks import StepLocks
from qadtr_brevitas.reproduce.study.plan import StudyPlan
from qadtr_brevitas.reproduce.study.resources import StudyResources
from qadtr_brevitas.reproduce.study.run import run_study
from qadtr_brevitas.reproduce.study.steps import StudyStep


@dataclass(frozen=True)
class SlowStep(StudyStep):
    """Writes when it starts, by which process, and when it ends."""

    def execute(self, resources: StudyResources, progress: Progress) -> None:
        self._log("start")
        time.sleep(1.0)
        self._log("end")

    def _log(self, what: str) -> None:
        with (self.folder.parent / "log").open("a") as file:
            file.write(f"{what} {self.name} {os.getpid()}\n")


def plan_of(folder: Path) -> StudyPlan:
    """Four steps, and one that needs the first two and one that needs that."""
    names = ("a", "b", "c", "d")
    free = [SlowStep(name, folder / name, name, ()) for name in names]
    both = SlowStep("e", folder / "e", "e", tuple(free[:2]))
    return StudyPlan((*free, both, SlowStep("f", folder / "f", "f", (both,))), (), ())


def log(folder: Path, what: str) -> list[str]:
    lines = (folder / "log").read_text().splitlines() if (folder / "log").exists() else []
    return [line.split()[1] for line in lines if line.startswith(what)]


@pytest.mark.slow
def test_steps_run_in_several_processes_and_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A process that begins anew loads PyTorch first, for longer than the steps take.
    monkeypatch.setattr(jobs, "get_context", lambda method: get_context("fork"))
    plan, resources = plan_of(tmp_path), StudyResources(tmp_path, "cpu")
    with helping_processes(plan, resources, tmp_path / "locks", jobs=2) as share:
        run_study(plan, resources, StepLocks(tmp_path / "locks"), shard=share, poll_seconds=0.1)
    assert sorted(log(tmp_path, "end")) == ["a", "b", "c", "d", "e", "f"]
    pids = {line.split()[2] for line in (tmp_path / "log").read_text().splitlines()}
    assert len(pids) == 2


def test_one_job_is_this_process(tmp_path: Path) -> None:
    with helping_processes(plan_of(tmp_path), StudyResources(tmp_path, "cpu"), tmp_path, jobs=1) as share:
        assert share is None
