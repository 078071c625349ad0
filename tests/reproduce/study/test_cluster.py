"""Which step is handed to a cluster when, with what, and what becomes of the study where steps fail or get lost."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest

from qadtr_brevitas.core.errors import DataError, StudyError, UsageError
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.reproduce.study import worker
from qadtr_brevitas.reproduce.study.cluster import run_on_ray
from qadtr_brevitas.reproduce.study.plan import StudyPlan
from qadtr_brevitas.reproduce.study.resources import StudyResources
from qadtr_brevitas.reproduce.study.run import StudyOutcome
from qadtr_brevitas.reproduce.study.schedule import RETRIES, RunningStep
from qadtr_brevitas.reproduce.study.steps import StudyStep
from qadtr_brevitas.reproduce.study.worker import note_file, read_note
from tests.reproduce.study.fake_ray import FakeRay, NodeDiedError, RayTaskError


@dataclass(frozen=True)
class LoggedStep(StudyStep):
    """A step that adds its name to a file; `broken`, `buggy` and `stopped` ones do what they say."""

    def processes(self, resources: StudyResources) -> int:
        return resources.processes if self.name == "a" else 1

    def execute(self, resources: StudyResources, progress: Progress) -> None:
        if self.settings == "broken":
            raise DataError("no images")
        if self.settings == "buggy":
            raise OSError("disk full")
        if self.settings == "stopped":
            raise KeyboardInterrupt
        progress(1, 2, "half")
        with (self.folder.parent / "log").open("a") as file:
            file.write(self.name)


def plan_of(folder: Path, **settings: str) -> StudyPlan:
    """Four steps: c needs a and b, d needs b."""

    def step(name: str, *needs: StudyStep) -> LoggedStep:
        return LoggedStep(name, folder / name, settings.get(name, name), needs)

    a, b = step("a"), step("b")
    return StudyPlan((a, b, step("c", a, b), step("d", b)), (), ())


@dataclass
class Cluster:
    """Runs a plan on a stand-in for Ray, and keeps what was said and shown."""

    folder: Path
    ray: FakeRay
    messages: list[str]
    shown: list[tuple[list[RunningStep], int, int]]

    def run(self, plan: StudyPlan, *, device: str = "cpu", processes: int = 1, threads: int = 1) -> StudyOutcome:
        return run_on_ray(
            plan,
            StudyResources(self.folder, device, processes),
            address="auto",
            threads=threads,
            report=self.messages.append,
            show=lambda steps, finished, total: self.shown.append((list(steps), finished, total)),
        )

    def log(self) -> str:
        return (self.folder / "log").read_text()


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    ray = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    # The tasks run in this process, which keeps its threads.
    monkeypatch.setattr(worker, "_prepare", lambda settings: None)
    return Cluster(tmp_path, ray, [], [])


def test_steps_run_once_after_those_they_need(cluster: Cluster) -> None:
    plan = plan_of(cluster.folder)
    assert cluster.run(plan).finished == ["a", "b", "c", "d"]
    assert cluster.log() == "abcd"
    assert cluster.run(plan).finished == []
    assert [shown[1:] for shown in cluster.shown] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    # What was written for the time of the study is gone.
    assert {file.suffix for file in (cluster.folder / "locks").iterdir()} == {".lock"}


def test_a_step_is_handed_over_as_soon_as_what_it_needs_is_finished(cluster: Cluster) -> None:
    cluster.run(plan_of(cluster.folder))
    assert [task.name for task in cluster.ray.handed] == ["a", "b", "c", "d"]
    assert [step.name for step in cluster.shown[0][0]] == ["b"]
    assert [step.name for step in cluster.shown[2][0]] == ["d"]


def test_a_lost_step_starts_again(cluster: Cluster) -> None:
    cluster.ray.failures = {"b": [NodeDiedError("gone"), NodeDiedError("gone")]}
    assert sorted(cluster.run(plan_of(cluster.folder)).finished) == ["a", "b", "c", "d"]
    assert sorted(cluster.log()) == ["a", "b", "c", "d"]
    assert sum(text.startswith("lost b (NodeDiedError)") for text in cluster.messages) == 2


def test_a_step_that_is_lost_too_often_fails_and_so_do_those_that_need_it(cluster: Cluster) -> None:
    cluster.ray.failures = {"a": [NodeDiedError("gone")] * (RETRIES + 1)}
    with pytest.raises(StudyError, match=rf"(?s)2 of 4 steps.*a: .*{RETRIES + 1} times.*NodeDiedError"):
        cluster.run(plan_of(cluster.folder))
    assert cluster.log() == "bd"


@pytest.mark.parametrize(
    ("kind", "cause"), [("broken", "a: no images"), ("buggy", f"OSError on {socket.gethostname()}")]
)
def test_a_failed_step_fails_those_that_need_it_only(cluster: Cluster, kind: str, cause: str) -> None:
    with pytest.raises(StudyError, match=r"2 of 4 steps") as caught:
        cluster.run(plan_of(cluster.folder, a=kind))
    assert cause in str(caught.value)
    assert cluster.log() == "bd"
    assert [task.name for task in cluster.ray.handed] == ["a", "b", "d"]


def test_a_node_without_the_package_is_no_loss(cluster: Cluster) -> None:
    cluster.ray.failures = {"a": [RayTaskError("trace\nModuleNotFoundError: No module named 'qadtr_brevitas'")]}
    with pytest.raises(StudyError, match=r"No module named 'qadtr_brevitas'; all nodes need this version"):
        cluster.run(plan_of(cluster.folder))


def test_a_node_that_does_not_see_the_folder_is_named(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_is_seen", lambda witness: False)
    with pytest.raises(StudyError, match=rf"{socket.gethostname()} does not see {cluster.folder}.*--work"):
        cluster.run(plan_of(cluster.folder))


def test_ctrl_c_interrupts_what_runs_and_leaves_no_file(cluster: Cluster) -> None:
    with pytest.raises(KeyboardInterrupt):
        cluster.run(plan_of(cluster.folder, a="stopped"))
    assert [task.name for task in cluster.ray.cancelled] == ["b"]
    assert {file.suffix for file in (cluster.folder / "locks").iterdir()} == {".lock"}


def test_each_process_of_a_training_takes_threads_and_a_gpu(cluster: Cluster) -> None:
    cluster.ray.resources = ({"CPU": 8.0, "GPU": 2.0}, {"CPU": 2.0})
    cluster.run(plan_of(cluster.folder), device="auto", processes=2, threads=3)
    needs = {task.name: (task.needs["CPU"], task.needs["GPU"]) for task in cluster.ray.handed}
    assert needs == {"a": (6, 2), "b": (3, 1), "c": (3, 1), "d": (3, 1)}


@pytest.mark.parametrize(
    ("device", "threads", "message"),
    [
        ("cuda", 1, "no GPU: give --device cpu"),
        ("cuda:1", 1, "cuda:1 does not go with --ray"),
        ("cpu", 3, r"3 CPUs and 0 GPUs that 'a' needs \(there are: 2 CPUs, 0 GPUs\).*--threads"),
    ],
)
def test_what_the_cluster_does_not_have_is_refused(cluster: Cluster, device: str, threads: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cluster.run(plan_of(cluster.folder), device=device, threads=threads)
    assert cluster.ray.handed == []


def test_a_step_says_where_it_runs_and_how_far_it_is(tmp_path: Path) -> None:
    step = plan_of(tmp_path).steps[0]
    assert read_note(tmp_path, step) is None
    notes = worker._Notes(note_file(tmp_path, step), "node-7")
    notes(3, 10, "loss 0.5")
    found = read_note(tmp_path, step)
    assert found is not None
    assert (found.host, found.done, found.total, found.note) == ("node-7", 3, 10, "loss 0.5")


class TestAddress:
    """An address is tried before Ray is asked, which tries for minutes."""

    @pytest.fixture(autouse=True)
    def not_connected(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))

    def refusal(self, folder: Path, address: str) -> str:
        with pytest.raises(UsageError) as caught:
            run_on_ray(plan_of(folder), StudyResources(folder, "cpu"), address=address)
        return str(caught.value)

    @pytest.fixture
    def closed_port(self) -> int:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            return taken.getsockname()[1]

    def test_where_nothing_listens(self, tmp_path: Path, closed_port: int) -> None:
        started = time.monotonic()
        for address in (f"127.0.0.1:{closed_port}", f"ray://127.0.0.1:{closed_port}", "127.0.0.1:99999"):
            found = self.refusal(tmp_path, address)
            assert f"no Ray cluster at {address!r}" in found
            assert all(advice in found for advice in ("ray start --head", "--jobs"))
        assert time.monotonic() - started < 5

    def test_where_the_last_cluster_of_this_machine_is_gone(
        self, tmp_path: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{closed_port}\n")
        assert f"no Ray cluster at '127.0.0.1:{closed_port}'" in self.refusal(tmp_path, "auto")

    @pytest.fixture
    def answers(self) -> Iterator[Callable[[bytes], str]]:
        """Return what opens a port at which a program answers with some bytes, and returns its address."""
        with ExitStack() as stack:

            def listen(answer: bytes) -> str:
                server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

                def serve() -> None:
                    connection, _ = server.accept()
                    with connection:
                        connection.recv(100)
                        connection.sendall(answer)

                Thread(target=serve, daemon=True).start()
                return f"127.0.0.1:{server.getsockname()[1]}"

            yield listen

    @pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
    def test_where_something_else_listens(self, tmp_path: Path, answers: Callable[[bytes], str], answer: bytes) -> None:
        assert "something else listens" in self.refusal(tmp_path, answers(answer))

    def test_what_ray_says_of_a_server_that_could_be_its_own(
        self, tmp_path: Path, answers: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def init(**options: object) -> None:
            raise RuntimeError("Version mismatch\nand more")

        monkeypatch.setattr(sys.modules["ray"], "init", init, raising=False)
        found = self.refusal(tmp_path, answers(bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))))
        assert "(Version mismatch)" in found

    @pytest.mark.parametrize("address", ["budget.images=5", "http://head:6379", "head:port", ""])
    def test_what_is_no_address(self, tmp_path: Path, address: str) -> None:
        assert "HOST:PORT" in self.refusal(tmp_path, address)


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'qadtr-brevitas\[ray\]'"):
        run_on_ray(plan_of(tmp_path), StudyResources(tmp_path, "cpu"), address="auto")
