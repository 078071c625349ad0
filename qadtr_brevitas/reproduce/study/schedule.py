"""Handing the steps of a study to workers: each after what it needs, and again where its worker died."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from qadtr_brevitas.core.errors import DataError
from qadtr_brevitas.reproduce.study.plan import StudyPlan
from qadtr_brevitas.reproduce.study.run import Report, StudyOutcome, fail_dependents, failure
from qadtr_brevitas.reproduce.study.steps import StudyStep
from qadtr_brevitas.reproduce.study.times import describe_remaining_time
from qadtr_brevitas.reproduce.study.worker import StepResult, note_file, read_note

RETRIES = 5
"""How often a step starts again after its worker died."""
_LOOK_SECONDS = 2.0


class WorkerLostError(Exception):
    """The worker of a step died; the message says how."""


class Workers(ABC):
    """Processes that run steps, on this machine or on others."""

    room: int | None = None
    """Steps that can be handed over at a time; None where the workers keep a queue themselves."""

    @abstractmethod
    def submit(self, step: StudyStep) -> Any:
        """Hand over a step, and return what stands for it."""

    @abstractmethod
    def wait(self, submitted: Sequence[Any], seconds: float) -> Sequence[Any]:
        """Return those of the submitted steps that ended; wait for one of them for so many seconds."""

    @abstractmethod
    def result(self, submitted: Any) -> StepResult:
        """Return what became of a step that ended.

        Raises:
            WorkerLostError: its worker died.
        """

    @abstractmethod
    def stop(self, submitted: Sequence[Any]) -> None:
        """Interrupt what runs, and wait until it has saved its state."""


class RunningStep(NamedTuple):
    """A step that was handed to the workers.

    Args:
        name: its name.
        host: the machine that runs it; empty as long as it waits for room.
        seconds: how long it has been running.
        done: finished parts of it.
        total: its parts; 0 if that is not known.
        note: a remark, such as the loss.
    """

    name: str
    host: str = ""
    seconds: float = 0.0
    done: int = 0
    total: int = 0
    note: str = ""


Show: TypeAlias = Callable[[Sequence[RunningStep], int, int], object]
"""Receives the steps at the workers, and how many of how many steps of the study are finished."""


def run_on_workers(plan: StudyPlan, workers: Workers, work: Path, *, report: Report, show: Show) -> StudyOutcome:
    """Run every step that is not finished.

    After a failed step, all steps that do not need it still run.

    Args:
        plan: the steps.
        workers: who runs them.
        work: the folder that studies share.
        report: called with messages about what happens.
        show: called every few seconds with what runs where.

    Raises:
        StudyError: steps failed; all others are finished.
    """
    schedule = _Schedule(plan, workers, work, report, show)
    try:
        return schedule.finish()
    except (KeyboardInterrupt, SystemExit):
        report("stopping; trainings save their state")
        workers.stop(list(schedule.running))
        raise


def missing_steps(plan: StudyPlan, outcome: StudyOutcome) -> list[StudyStep]:
    """Return the steps that are not finished and did not fail."""
    gone = {*outcome.finished, *outcome.failed}
    return [step for step in plan.steps if step.name not in gone and not step.is_finished()]


@dataclass
class _Schedule:
    """What was handed to the workers, and what came back."""

    plan: StudyPlan
    workers: Workers
    work: Path
    report: Report
    show: Show
    outcome: StudyOutcome = field(default_factory=StudyOutcome)
    running: dict[Any, StudyStep] = field(default_factory=dict[Any, StudyStep])
    since: dict[str, float] = field(default_factory=dict[str, float])
    losses: Counter[str] = field(default_factory=Counter[str])

    def finish(self) -> StudyOutcome:
        """Hand over steps as soon as what they need is finished, until nothing is left."""
        while missing := missing_steps(self.plan, self.outcome):
            fail_dependents(missing, self.outcome)
            self._submit_ready(missing)
            if not self.running:
                break
            for submitted in self.workers.wait(list(self.running), _LOOK_SECONDS):
                self._receive(self.running.pop(submitted), submitted)
            self.show([self._describe(step) for step in self.running.values()], *self._counts())
        if self.outcome.failed:
            raise failure(self.outcome, self.plan)
        return self.outcome

    def _submit_ready(self, missing: Sequence[StudyStep]) -> None:
        handed = {step.name for step in self.running.values()}
        for step in missing:
            if self.workers.room is not None and len(self.running) >= self.workers.room:
                return
            if step.name not in handed and step.name not in self.outcome.failed and self._is_ready(step):
                self.running[self.workers.submit(step)] = step

    def _is_ready(self, step: StudyStep) -> bool:
        # The files of another machine may be seen later than its answer.
        return all(need.name in self.outcome.finished or need.is_finished() for need in step.needs)

    def _receive(self, step: StudyStep, submitted: Any) -> None:
        """Note what became of a step."""
        self.since.pop(step.name, None)
        try:
            result = self.workers.result(submitted)
        except WorkerLostError as error:
            return self._lose(step, str(error))
        if result.is_stopped:
            self._lose(step, f"stopped on {result.host}")
        elif result.error:
            self._fail(step, result.error)
        else:
            self.outcome.finished.append(step.name)
            left = describe_remaining_time(self.plan.steps)
            self.report(f"finished {step.name} on {result.host}" + (f" ({left} of work left)" if left else ""))

    def _lose(self, step: StudyStep, reason: str) -> None:
        self.losses[step.name] += 1
        note_file(self.work, step).unlink(missing_ok=True)
        if self.losses[step.name] > RETRIES:
            self._fail(step, f"its worker died {self.losses[step.name]} times, at last: {reason}")
        else:
            self.report(f"lost {step.name} ({reason}); it starts again, and trainings resume")

    def _fail(self, step: StudyStep, error: str) -> None:
        self.outcome.failed[step.name] = DataError(error)
        self.report(f"{step.name} failed: {error}")

    def _describe(self, step: StudyStep) -> RunningStep:
        note = read_note(self.work, step)
        if note is None:
            return RunningStep(step.name)
        since = self.since.setdefault(step.name, time.monotonic())
        return RunningStep(step.name, note.host, time.monotonic() - since, note.done, note.total, note.note)

    def _counts(self) -> tuple[int, int]:
        return sum(step.is_finished() for step in self.plan.steps), len(self.plan.steps)
