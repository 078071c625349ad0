"""A stand-in for the module `ray` that runs tasks in this process, and can lose or refuse them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class RayError(Exception):
    """What every failure of Ray itself is."""


class RayTaskError(RayError):
    """A task raised, or could not be read by its node."""


class NodeDiedError(RayError):
    """A node died while it ran the task."""


class Exceptions:
    RayError, RayTaskError = RayError, RayTaskError


@dataclass(eq=False)
class Task:
    """A task that was handed to the cluster."""

    name: str
    needs: Mapping[str, int]
    call: Callable[[], Any]


@dataclass
class Remote:
    """A function whose calls are tasks."""

    ray: FakeRay
    function: Callable[..., Any]
    name: str = ""
    needs: Mapping[str, int] = field(default_factory=dict)

    def options(self, *, name: str, num_cpus: int, num_gpus: int, max_retries: int) -> Remote:
        assert max_retries == 0
        return Remote(self.ray, self.function, name, {"CPU": num_cpus, "GPU": num_gpus})

    def remote(self, *arguments: object) -> Task:
        task = Task(self.name, self.needs, lambda: self.function(*arguments))
        self.ray.handed.append(task)
        return task


@dataclass
class FakeRay:
    """The functions of Ray that a study uses.

    Args:
        resources: what each node has.
        failures: errors that tasks of a name end with instead of running, one after the other.
    """

    resources: Sequence[Mapping[str, float]] = ({"CPU": 2.0},)
    failures: Mapping[str, list[Exception]] = field(default_factory=dict)
    handed: list[Task] = field(default_factory=list)
    cancelled: list[Task] = field(default_factory=list)
    exceptions: type[Exceptions] = Exceptions

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": node} for node in self.resources]

    def cluster_resources(self) -> dict[str, float]:
        return {kind: sum(node.get(kind, 0) for node in self.resources) for kind in ("CPU", "GPU")}

    def remote(self, function: Callable[..., Any]) -> Remote:
        return Remote(self, function)

    def wait(self, tasks: Sequence[Task], *, num_returns: int, timeout: float) -> tuple[Sequence[Task], Sequence[Task]]:
        return tasks[:num_returns], tasks[num_returns:]

    def get(self, task: Task) -> Any:
        if errors := self.failures.get(task.name):
            raise errors.pop(0)
        return task.call()

    def cancel(self, task: Task) -> None:
        self.cancelled.append(task)
