"""A study on a real Ray cluster of three nodes, one of which is killed in the middle."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.reproduce.study.cluster import run_on_ray
from qadtr_brevitas.reproduce.study.plan import StudyPlan
from qadtr_brevitas.reproduce.study.resources import StudyResources
from qadtr_brevitas.reproduce.study.sections import Study
from qadtr_brevitas.reproduce.study.steps import StudyStep
from qadtr_brevitas.reproduce.study.summary import write_study
from tests.reproduce.study.support import RECIPE, plan_study, run_plan, write_study_file

ray: Any = pytest.importorskip("ray", reason="needs Ray: pip install 'qadtr-brevitas[ray]'")
_MEMORY = 80_000_000
_REPOSITORY = Path(__file__).parents[3]


@dataclass(frozen=True)
class KilledStep(StudyStep):
    """A step that notes its node and works for long, the first time; then it ends at once."""

    def execute(self, resources: StudyResources, progress: Progress) -> None:
        log = self.folder.parent / "log"
        is_first = not log.exists()
        with log.open("a") as file:
            file.write(f"{ray.get_runtime_context().get_node_id()}\n")
        if is_first:
            time.sleep(300)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head that runs no steps, and two nodes."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(_REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": _MEMORY})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(
    "PYTEST_XDIST_WORKER" in os.environ, reason="its nodes need the cores for themselves: make test-ray"
)
def test_no_step_is_lost_or_made_twice_when_a_node_dies(cluster: Any, tmp_path: Path) -> None:
    nodes = {node.node_id: node for node in (cluster.add_node(num_cpus=1, object_store_memory=_MEMORY) for _ in "ab")}
    study, plan, work = _planned(tmp_path)
    killed = KilledStep("wait", tmp_path / "wait", "wait", ())
    messages: list[str] = []

    def kill_its_node() -> None:
        while not (tmp_path / "log").exists() or not (tmp_path / "log").read_text():
            time.sleep(0.1)
        cluster.remove_node(nodes[(tmp_path / "log").read_text().strip()], allow_graceful=False)

    killer = Thread(target=kill_its_node, daemon=True)
    killer.start()
    outcome = run_on_ray(
        replace(plan, steps=[killed, *plan.steps]),
        StudyResources(work, "cpu"),
        address=cluster.address,
        report=messages.append,
    )
    killer.join()
    assert sorted(outcome.finished) == sorted(["wait", *(step.name for step in plan.steps)])
    assert any(text.startswith("lost wait") for text in messages)
    first, second = (tmp_path / "log").read_text().split()
    assert first != second
    assert _figures(study, plan, tmp_path) == _figures_of_one_process(tmp_path / "alone")


def _planned(folder: Path) -> tuple[Study, StudyPlan, Path]:
    folder.mkdir(exist_ok=True)
    # Nodes know the networks of the package only.
    file = write_study_file(folder, recipe=RECIPE.replace("train_tiny_net", "cifar_resnet8"))
    return plan_study(file, scale="smoke")


def _figures(study: Study, plan: StudyPlan, folder: Path) -> list[str]:
    write_study(study, plan, folder / "out", scale="smoke", command="study")
    return (folder / "out" / "figures.csv").read_text().splitlines()


def _figures_of_one_process(folder: Path) -> list[str]:
    study, plan, work = _planned(folder)
    run_plan(plan, work)
    return _figures(study, plan, folder)
