"""Running the steps of a study as tasks of a Ray cluster: after what they need, and again where a node dies.

All nodes see the folders under the same paths. The locks of steps stay in use: they keep a second command on the same
folders, and a step that starts again, from running what another process still works on.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
from uuid import uuid4

from qadtr_brevitas.core.errors import DataError, UsageError
from qadtr_brevitas.reproduce.study.cluster_address import connected
from qadtr_brevitas.reproduce.study.cluster_task import StepResult, TaskSettings, note_file, read_note, run_step
from qadtr_brevitas.reproduce.study.plan import StudyPlan
from qadtr_brevitas.reproduce.study.resources import StudyResources
from qadtr_brevitas.reproduce.study.run import Report, StudyOutcome, fail_dependents, failure
from qadtr_brevitas.reproduce.study.steps import StudyStep
from qadtr_brevitas.reproduce.study.times import describe_remaining_time

RETRIES = 5
"""How often a step starts again after its node or its process died."""
_LOOK_SECONDS, _STOP_SECONDS = 2.0, 60.0


class RunningStep(NamedTuple):
    """A step that was handed to the cluster.

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
"""Receives the steps at the cluster, and how many of how many steps of the study are finished."""


def run_on_ray(
    plan: StudyPlan,
    resources: StudyResources,
    *,
    address: str,
    threads: int = 1,
    report: Report = lambda message: None,
    show: Show = lambda steps, finished, total: None,
) -> StudyOutcome:
    """Run every step that is not finished on a Ray cluster.

    A step takes `threads` CPUs, and a GPU where the device is one; a training takes that for each of its processes.
    After a failed step, all steps that do not need it still run.

    Args:
        plan: the steps; the folders are absolute, and all nodes see them.
        resources: what they run with. The device `auto` is `cuda` if the cluster has GPUs, and else `cpu`.
        address: of the cluster, see `connected`.
        threads: CPU threads of each process.
        report: called with messages about what happens.
        show: called every few seconds with what runs where.

    Raises:
        UsageError: Ray is not installed, there is no cluster at the address, or no node has room for a step.
        StudyError: steps failed; all others are finished.
    """
    with connected(address) as ray:
        device = _device(ray, resources.device_name)
        witness = resources.work / "locks" / f".seen-{uuid4().hex[:8]}"
        settings = TaskSettings(
            work=resources.work,
            device=device,
            processes=resources.processes,
            command=resources.command,
            compiles=resources.compiles,
            threads=threads,
            current=Path.cwd(),
            environment={name: value for name, value in os.environ.items() if name.startswith("QADTR_BREVITAS_")},
            witness=witness,
        )
        run = _ClusterRun(ray, plan, resources, settings, report, show)
        run.check_room()
        witness.parent.mkdir(parents=True, exist_ok=True)
        witness.touch()
        try:
            return run.finish()
        except (KeyboardInterrupt, SystemExit):
            run.stop()
            raise
        finally:
            witness.unlink(missing_ok=True)


@dataclass
class _ClusterRun:
    """A study on a cluster: what was handed to it, and what came back."""

    ray: Any
    plan: StudyPlan
    resources: StudyResources
    settings: TaskSettings
    report: Report
    show: Show
    outcome: StudyOutcome = field(default_factory=StudyOutcome)
    running: dict[Any, StudyStep] = field(default_factory=dict[Any, StudyStep])
    since: dict[str, float] = field(default_factory=dict[str, float])
    losses: Counter[str] = field(default_factory=Counter[str])

    def __post_init__(self) -> None:
        self.task: Any = self.ray.remote(run_step)

    def check_room(self) -> None:
        """Refuse steps for which no node of the cluster is large enough."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        for step in self._missing():
            cpus, gpus = self._needs(step)
            if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
                has = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes)
                raise UsageError(
                    f"no node has the {cpus} CPUs and {gpus} GPUs that {step.name!r} needs (there are: {has}): give "
                    "smaller --threads or --processes, or start a larger node"
                )

    def finish(self) -> StudyOutcome:
        """Hand steps to the cluster as soon as what they need is finished, until nothing is left."""
        missing = self._missing()
        nodes = sum(node["Alive"] for node in self.ray.nodes())
        self.report(f"{len(missing)} of {len(self.plan.steps)} steps are to do, on {nodes} nodes of the Ray cluster")
        while missing := self._missing():
            fail_dependents(missing, self.outcome)
            handed = {step.name for step in self.running.values()}
            for step in missing:
                if step.name not in handed and step.name not in self.outcome.failed and self._is_ready(step):
                    self._submit(step)
            if not self.running:
                break
            done, _ = self.ray.wait(list(self.running), num_returns=1, timeout=_LOOK_SECONDS)
            for reference in done:
                self._receive(self.running.pop(reference), reference)
            self.show([self._describe(step) for step in self.running.values()], *self._counts())
        if self.outcome.failed:
            raise failure(self.outcome, self.plan)
        return self.outcome

    def stop(self) -> None:
        """Interrupt what runs, and wait until it has saved its state."""
        self.report("stopping; trainings save their state")
        running = list(self.running)
        for reference in running:
            self.ray.cancel(reference)
        if running:
            self.ray.wait(running, num_returns=len(running), timeout=_STOP_SECONDS)

    def _missing(self) -> list[StudyStep]:
        """Return the steps that are not finished and did not fail."""
        gone = {*self.outcome.finished, *self.outcome.failed}
        return [step for step in self.plan.steps if step.name not in gone and not step.is_finished()]

    def _is_ready(self, step: StudyStep) -> bool:
        # The files of another machine may be seen later than its answer.
        return all(need.name in self.outcome.finished or need.is_finished() for need in step.needs)

    def _needs(self, step: StudyStep) -> tuple[int, int]:
        """Return the CPUs and GPUs of a step."""
        processes = step.processes(self.resources)
        return self.settings.threads * processes, processes if self.settings.device == "cuda" else 0

    def _submit(self, step: StudyStep) -> None:
        cpus, gpus = self._needs(step)
        # What is lost starts again here, so that this process can say so.
        task = self.task.options(name=step.name, num_cpus=cpus, num_gpus=gpus, max_retries=0)
        self.running[task.remote(step, self.settings)] = step

    def _receive(self, step: StudyStep, reference: Any) -> None:
        """Note what became of a step."""
        self.since.pop(step.name, None)
        try:
            result: StepResult = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            # The step itself catches its errors, so the node could not start it.
            self._fail(step, f"{_last_line(error)}; all nodes need this version of qadtr-brevitas and its plug-ins")
        except self.ray.exceptions.RayError as error:
            self._lose(step, type(error).__name__)
        else:
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
        note_file(self.settings.work, step).unlink(missing_ok=True)
        if self.losses[step.name] > RETRIES:
            self._fail(step, f"its node or process died {self.losses[step.name]} times, at last: {reason}")
        else:
            self.report(f"lost {step.name} ({reason}); it starts again, and trainings resume")

    def _fail(self, step: StudyStep, error: str) -> None:
        self.outcome.failed[step.name] = DataError(error)
        self.report(f"{step.name} failed: {error}")

    def _describe(self, step: StudyStep) -> RunningStep:
        note = read_note(self.settings.work, step)
        if note is None:
            return RunningStep(step.name)
        since = self.since.setdefault(step.name, time.monotonic())
        return RunningStep(step.name, note.host, time.monotonic() - since, note.done, note.total, note.note)

    def _counts(self) -> tuple[int, int]:
        return sum(step.is_finished() for step in self.plan.steps), len(self.plan.steps)


def _device(ray: Any, name: str) -> str:
    """Return the device of all tasks."""
    gpus = ray.cluster_resources().get("GPU", 0)
    if name == "auto":
        return "cuda" if gpus else "cpu"
    if name not in ("cpu", "cuda"):
        raise UsageError(
            f"--device {name} does not go with --ray, which chooses the GPU of each step: give cpu or cuda"
        )
    if name == "cuda" and not gpus:
        raise UsageError("the Ray cluster has no GPU: give --device cpu, or start its nodes with --num-gpus")
    return name


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
