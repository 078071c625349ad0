"""The nodes of a Ray cluster as the workers of a study; all of them see the folders under the same paths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.reproduce.study.cluster_address import connected
from qadtr_brevitas.reproduce.study.locks import LOCKS_FOLDER
from qadtr_brevitas.reproduce.study.plan import StudyPlan
from qadtr_brevitas.reproduce.study.resources import StudyResources
from qadtr_brevitas.reproduce.study.run import Report, StudyOutcome
from qadtr_brevitas.reproduce.study.schedule import Show, WorkerLostError, Workers, missing_steps, run_on_workers
from qadtr_brevitas.reproduce.study.steps import StudyStep
from qadtr_brevitas.reproduce.study.worker import StepResult, TaskSettings, run_step

_STOP_SECONDS = 60.0


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
        witness = resources.work / LOCKS_FOLDER / f".seen-{uuid4().hex[:8]}"
        settings = TaskSettings.of(
            resources, device=_device(ray, resources.device_name), threads=threads, witness=witness
        )
        workers, missing = RayWorkers(ray, resources, settings), missing_steps(plan, StudyOutcome())
        workers.check_room(missing)
        _make_witness(witness)
        nodes = sum(node["Alive"] for node in ray.nodes())
        report(f"{len(missing)} of {len(plan.steps)} steps are to do, on {nodes} nodes of the Ray cluster")
        try:
            return run_on_workers(plan, workers, resources.work, report=report, show=show)
        finally:
            witness.unlink(missing_ok=True)


class RayWorkers(Workers):
    """The nodes of a cluster, which keeps a queue of what it has no room for.

    Args:
        ray: the module `ray`, connected.
        resources: says how many processes a step has.
        settings: of all tasks.
    """

    def __init__(self, ray: Any, resources: StudyResources, settings: TaskSettings) -> None:
        self._ray, self._resources, self._settings = ray, resources, settings
        self._task: Any = ray.remote(run_step)

    def check_room(self, steps: Sequence[StudyStep]) -> None:
        """Refuse steps for which no node of the cluster is large enough.

        Raises:
            UsageError: there is such a step.
        """
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        for step in steps:
            cpus, gpus = self._needs(step)
            if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
                has = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes)
                raise UsageError(
                    f"no node has the {cpus} CPUs and {gpus} GPUs that {step.name!r} needs (there are: {has}): give "
                    "smaller --threads or --processes, or start a larger node"
                )

    def submit(self, step: StudyStep) -> Any:
        cpus, gpus = self._needs(step)
        # What is lost starts again here, so that this process can say so.
        task = self._task.options(name=step.name, num_cpus=cpus, num_gpus=gpus, max_retries=0)
        return task.remote(step, self._settings)

    def wait(self, submitted: Sequence[Any], seconds: float) -> Sequence[Any]:
        ended, _ = self._ray.wait(list(submitted), num_returns=1, timeout=seconds)
        return ended

    def result(self, submitted: Any) -> StepResult:
        try:
            return self._ray.get(submitted)
        except self._ray.exceptions.RayTaskError as error:
            # The step itself catches its errors, so the node could not start it.
            advice = "all nodes need this version of qadtr-brevitas and its plug-ins"
            return StepResult("the cluster", f"{_last_line(error)}; {advice}")
        except self._ray.exceptions.RayError as error:
            raise WorkerLostError(type(error).__name__) from error

    def stop(self, submitted: Sequence[Any]) -> None:
        for reference in submitted:
            self._ray.cancel(reference)
        if submitted:
            self._ray.wait(list(submitted), num_returns=len(submitted), timeout=_STOP_SECONDS)

    def _needs(self, step: StudyStep) -> tuple[int, int]:
        """Return the CPUs and GPUs of a step."""
        processes = step.processes(self._resources)
        return self._settings.threads * processes, processes if self._settings.device == "cuda" else 0


def _make_witness(witness: Path) -> None:
    witness.parent.mkdir(parents=True, exist_ok=True)
    witness.touch()


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
