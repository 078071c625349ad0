"""Processes of this machine as the workers of a study."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from socket import gethostname
from types import FrameType

from qadtr_brevitas.reproduce.study.plan import StudyPlan
from qadtr_brevitas.reproduce.study.resources import StudyResources
from qadtr_brevitas.reproduce.study.run import Report, StudyOutcome
from qadtr_brevitas.reproduce.study.schedule import Show, WorkerLostError, Workers, run_on_workers
from qadtr_brevitas.reproduce.study.steps import StudyStep
from qadtr_brevitas.reproduce.study.worker import StepResult, TaskSettings, run_step

_STOP_SECONDS = 60.0


def run_in_processes(
    plan: StudyPlan,
    resources: StudyResources,
    *,
    jobs: int,
    report: Report = lambda message: None,
    show: Show = lambda steps, finished, total: None,
) -> StudyOutcome:
    """Run every step that is not finished, several at a time; the processes share the cores.

    After a failed step, all steps that do not need it still run. A step whose process was killed starts again.

    Args:
        plan: the steps.
        resources: what they run with.
        jobs: processes.
        report: called with messages about what happens.
        show: called every few seconds with what runs.

    Raises:
        StudyError: steps failed; all others are finished.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with _local_workers(TaskSettings.of(resources, device=resources.device_name, threads=threads), jobs) as workers:
        return run_on_workers(plan, workers, resources.work, report=report, show=show)


class LocalWorkers(Workers):
    """Processes of this machine, which keep models and images from one step to the next.

    Each is a pool of one: a larger pool ends all of its processes when one is killed.

    Args:
        settings: of all steps.
        jobs: processes.
    """

    def __init__(self, settings: TaskSettings, jobs: int) -> None:
        self.room = jobs
        self._settings = settings
        self._idle = [_process() for _ in range(jobs)]
        self._busy: dict[Future[StepResult], ProcessPoolExecutor] = {}

    def submit(self, step: StudyStep) -> Future[StepResult]:
        process = self._idle.pop()
        future = process.submit(run_step, step, self._settings)
        self._busy[future] = process
        return future

    def wait(self, submitted: Sequence[Future[StepResult]], seconds: float) -> Sequence[Future[StepResult]]:
        return list(wait(submitted, timeout=seconds, return_when=FIRST_COMPLETED).done)

    def result(self, submitted: Future[StepResult]) -> StepResult:
        process = self._busy.pop(submitted)
        try:
            found = submitted.result()
        except (KeyboardInterrupt, SystemExit):
            # A signal to that process alone.
            found = StepResult(gethostname(), is_stopped=True)
        except BrokenProcessPool as error:
            process.shutdown(wait=False)
            self._idle.append(_process())
            raise WorkerLostError("its process was killed, often for lack of memory") from error
        self._idle.append(process)
        return found

    def stop(self, submitted: Sequence[Future[StepResult]]) -> None:
        # After a Ctrl-C they have their signal already, and trainings end at once only at a second one of its kind.
        for process in active_children():
            process.terminate()
        wait(submitted, timeout=_STOP_SECONDS)

    def close(self) -> None:
        """End the processes."""
        for process in [*self._idle, *self._busy.values()]:
            process.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _local_workers(settings: TaskSettings, jobs: int) -> Generator[LocalWorkers]:
    workers = LocalWorkers(settings, jobs)
    try:
        yield workers
    finally:
        workers.close()


def _process() -> ProcessPoolExecutor:
    # A fork would copy the threads of PyTorch in whatever state they are.
    return ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"), initializer=_end_quietly_at_signals)


def _end_quietly_at_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
