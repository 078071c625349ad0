"""Running the steps of a study that are missing, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from qadtr_brevitas.core.errors import QadtrError, StudyError
from qadtr_brevitas.core.progress import Progress, silent
from qadtr_brevitas.reproduce.study.locks import step_lock
from qadtr_brevitas.reproduce.study.plan import StudyPlan
from qadtr_brevitas.reproduce.study.resources import StudyResources
from qadtr_brevitas.reproduce.study.steps import StudyStep
from qadtr_brevitas.reproduce.study.times import describe_remaining_time
from qadtr_brevitas.training.stop import Interrupted

Report: TypeAlias = Callable[[str], object]
"""Receives a message about what happens."""
StartProgress: TypeAlias = Callable[[str], Progress]
"""Receives the name of a step that starts, and returns its progress."""


@dataclass
class StudyOutcome:
    """The results of the steps.

    Args:
        finished: names of the steps that this command finished.
        failed: names of the steps that failed, and why.
    """

    finished: list[str] = field(default_factory=list[str])
    failed: dict[str, QadtrError] = field(default_factory=dict[str, QadtrError])


def run_study(
    plan: StudyPlan,
    resources: StudyResources,
    *,
    report: Report = lambda message: None,
    start_progress: StartProgress = lambda step: silent,
) -> StudyOutcome:
    """Run every step that is not finished; a step that another command runs is waited for.

    After a failed step, all steps that do not need it still run.

    Args:
        plan: the steps, each after those it needs.
        resources: what they run with.
        report: called with messages about what happens.
        start_progress: called when a step starts.

    Raises:
        StudyError: steps failed; all others are finished.
        Interrupted: a training was stopped by Ctrl-C or a signal, after its state was saved.
    """
    outcome = StudyOutcome()
    for step in plan.steps:
        if step.is_finished():
            continue
        fail_dependents([step], outcome)
        if step.name not in outcome.failed:
            _run_step(step, plan, resources, outcome, report, start_progress)
    if outcome.failed:
        raise failure(outcome, plan)
    return outcome


def _run_step(
    step: StudyStep,
    plan: StudyPlan,
    resources: StudyResources,
    outcome: StudyOutcome,
    report: Report,
    start_progress: StartProgress,
) -> None:
    def waits() -> None:
        report(f"waiting for {step.name}, which another command runs")

    with step_lock(resources.work, step, waits=waits):
        # Another command may have finished it meanwhile.
        if step.is_finished():
            return
        report(_start_message(step, plan))
        try:
            step.run(resources, start_progress(step.name))
        except Interrupted:
            raise
        except QadtrError as error:
            outcome.failed[step.name] = error
            report(f"{step.name} failed: {error}")
        else:
            outcome.finished.append(step.name)


def _start_message(step: StudyStep, plan: StudyPlan) -> str:
    finished = sum(other.is_finished() for other in plan.steps)
    left = describe_remaining_time(plan.steps)
    return f"step {finished + 1} of {len(plan.steps)}: {step.name}" + (f" ({left} left)" if left else "")


def fail_dependents(missing: Sequence[StudyStep], outcome: StudyOutcome) -> None:
    """Mark the steps that need a failed step as failed."""
    for step in missing:
        for need in step.needs:
            if need.name in outcome.failed and step.name not in outcome.failed:
                outcome.failed[step.name] = StudyError(f"it needs: {need.name}")


def failure(outcome: StudyOutcome, plan: StudyPlan) -> StudyError:
    """Return the error of a study with failed steps, which lists each cause once."""
    steps_by_cause: dict[str, list[str]] = {}
    for name, error in outcome.failed.items():
        if not isinstance(error, StudyError):
            steps_by_cause.setdefault(str(error), []).append(name)
    lines = [f"{_first_and_count(names)}: {cause}" for cause, names in steps_by_cause.items()]
    return StudyError(
        f"{len(outcome.failed)} of {len(plan.steps)} steps of the study failed or need one that failed; the finished "
        "ones are kept. Remove the cause and give the same command:\n" + "\n".join(lines)
    )


def _first_and_count(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"
