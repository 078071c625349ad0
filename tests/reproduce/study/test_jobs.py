"""Steps of a study in several processes of one machine."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from threading import Thread

import pytest

from qadtr_brevitas.core.errors import DataError, StudyError
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.reproduce.study import jobs
from qadtr_brevitas.reproduce.study.jobs import run_in_processes
from qadtr_brevitas.reproduce.study.plan import StudyPlan
from qadtr_brevitas.reproduce.study.resources import StudyResources
from qadtr_brevitas.reproduce.study.steps import StudyStep


@dataclass(frozen=True)
class SlowStep(StudyStep):
    """Writes when it starts, by which process, and when it ends; `killed` waits for a signal, the first time."""

    def execute(self, resources: StudyResources, progress: Progress) -> None:
        is_first = self.name not in log(self.folder.parent, "start")
        self._log("start")
        if self.settings == "broken":
            raise DataError("no images")
        time.sleep(300 if self.settings == "killed" and is_first else 1.0)
        self._log("end")

    def _log(self, what: str) -> None:
        with (self.folder.parent / "log").open("a") as file:
            file.write(f"{what} {self.name} {os.getpid()}\n")


@pytest.fixture(autouse=True)
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    # A process that begins anew loads PyTorch first, for longer than the steps take.
    monkeypatch.setattr(jobs, "get_context", lambda method: get_context("fork"))


@pytest.fixture
def ctrl_c_interrupts() -> Iterator[None]:
    # The workers of pytest-xdist ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def plan_of(folder: Path, **settings: str) -> StudyPlan:
    """Four steps, one that needs the first two, and one that needs that."""

    def step(name: str, *needs: StudyStep) -> SlowStep:
        return SlowStep(name, folder / name, settings.get(name, name), needs)

    free = [step(name) for name in "abcd"]
    both = step("e", *free[:2])
    return StudyPlan((*free, both, step("f", both)), (), ())


def lines(folder: Path) -> list[list[str]]:
    file = folder / "log"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def log(folder: Path, what: str) -> list[str]:
    return [name for event, name, _ in lines(folder) if event == what]


def when_started(folder: Path, name: str, act: Callable[[int], object]) -> Thread:
    """Call a function with the process of a step as soon as the step has started."""

    def watch() -> None:
        while name not in log(folder, "start"):
            time.sleep(0.05)
        act(next(int(pid) for event, started, pid in lines(folder) if (event, started) == ("start", name)))

    thread = Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_steps_run_in_several_processes_and_once_each(tmp_path: Path) -> None:
    outcome = run_in_processes(plan_of(tmp_path), StudyResources(tmp_path, "cpu"), jobs=2)
    ended = log(tmp_path, "end")
    assert sorted(ended) == sorted(outcome.finished) == ["a", "b", "c", "d", "e", "f"]
    assert max(ended.index("a"), ended.index("b")) < ended.index("e") < ended.index("f")
    assert len({pid for _, _, pid in lines(tmp_path)}) == 2
    # Two at a time: the second starts before the first ends.
    assert [event for event, _, _ in lines(tmp_path)][:2] == ["start", "start"]


@pytest.mark.slow
def test_a_failed_step_stops_only_the_steps_that_need_it(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"(?s)3 of 6 steps.*a: no images"):
        run_in_processes(plan_of(tmp_path, a="broken"), StudyResources(tmp_path, "cpu"), jobs=3)
    assert sorted(log(tmp_path, "end")) == ["b", "c", "d"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_step_whose_process_was_killed_starts_again_and_no_other(tmp_path: Path, number: signal.Signals) -> None:
    messages: list[str] = []
    killer = when_started(tmp_path, "a", lambda pid: os.kill(pid, number))
    outcome = run_in_processes(
        plan_of(tmp_path, a="killed"), StudyResources(tmp_path, "cpu"), jobs=2, report=messages.append
    )
    killer.join()
    assert sorted(outcome.finished) == ["a", "b", "c", "d", "e", "f"]
    assert sorted(log(tmp_path, "start")) == ["a", "a", "b", "c", "d", "e", "f"]
    assert sum(text.startswith("lost a ") for text in messages) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_ctrl_c_ends_all_processes(tmp_path: Path) -> None:
    started: list[int] = []

    def interrupt(pid: int) -> None:
        started.append(pid)
        os.kill(os.getpid(), signal.SIGINT)

    killer = when_started(tmp_path, "a", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_in_processes(plan_of(tmp_path, a="killed"), StudyResources(tmp_path, "cpu"), jobs=2)
    killer.join()
    for _ in range(100):
        if not Path(f"/proc/{started[0]}").exists() or not any(p.pid == started[0] for p in jobs.active_children()):
            return
        time.sleep(0.1)
    pytest.fail("a process is left")
