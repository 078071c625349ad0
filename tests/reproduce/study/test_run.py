"""Running a study: each step once, after the steps it needs, with failures, interruptions and several processes."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest

from qadtr_brevitas.core.errors import DataError, ExportError, StudyError
from qadtr_brevitas.core.progress import Progress, silent
from qadtr_brevitas.quant import SwitchableModel
from qadtr_brevitas.reproduce.study import attack_steps, model_steps
from qadtr_brevitas.reproduce.study.locks import step_lock
from qadtr_brevitas.reproduce.study.model_steps import TrainingProgress
from qadtr_brevitas.reproduce.study.plan import StudyPlan
from qadtr_brevitas.reproduce.study.resources import StudyResources
from qadtr_brevitas.reproduce.study.run import run_study
from qadtr_brevitas.reproduce.study.steps import StudyStep
from qadtr_brevitas.reproduce.study.times import describe_remaining_time
from qadtr_brevitas.training.log import StepRecord
from qadtr_brevitas.training.stop import Interrupted
from tests.reproduce.study.support import RECIPE, plan_study, run, write_study_file


@dataclass(frozen=True)
class LoggedStep(StudyStep):
    """A step that adds its name to `log`, or fails if it is `broken`."""

    log: ClassVar[list[str]] = []
    broken: ClassVar[set[str]] = set()

    def execute(self, resources: StudyResources, progress: Progress) -> None:
        if self.name in self.broken:
            raise DataError("no images")
        self.log.append(self.name)
        progress(1, 1, "")


class OtherStep(LoggedStep):
    """A step of another kind."""


@pytest.fixture
def plan(tmp_path: Path) -> StudyPlan:
    LoggedStep.log.clear()
    LoggedStep.broken.clear()
    first = LoggedStep("first", tmp_path / "first", [1], ())
    second = LoggedStep("second", tmp_path / "second", [2], ())
    third = LoggedStep("third", tmp_path / "third", [3], (first, second))
    fourth = LoggedStep("fourth", tmp_path / "fourth", [4], (second,))
    return StudyPlan((first, second, third, fourth), (), ())


def finish(plan: StudyPlan, folder: Path, **options: object) -> list[str]:
    return run_study(plan, StudyResources(folder, "cpu"), **options).finished


def test_steps_run_once_after_those_they_need(plan: StudyPlan, tmp_path: Path) -> None:
    assert finish(plan, tmp_path) == LoggedStep.log == ["first", "second", "third", "fourth"]
    assert finish(plan, tmp_path) == []


def test_messages_say_which_step_it_is_and_how_long_the_rest_takes(plan: StudyPlan, tmp_path: Path) -> None:
    messages: list[str] = []
    finish(plan, tmp_path, report=messages.append)
    assert [text.partition(" (")[0] for text in messages] == [
        f"step {number} of 4: {name}" for number, name in enumerate(LoggedStep.log, start=1)
    ]
    assert "left" not in messages[0]
    assert all("left" in text for text in messages[1:])


def test_a_step_is_expected_to_take_as_long_as_others_of_its_kind(plan: StudyPlan, tmp_path: Path) -> None:
    assert describe_remaining_time(plan.steps) == ""
    for step, seconds in zip(plan.steps[:2], (3600, 7200), strict=True):
        step.run(StudyResources(tmp_path, "cpu"), silent)
        step.marker.write_text(json.dumps({**json.loads(step.marker.read_text()), "seconds": seconds}))
    assert describe_remaining_time(plan.steps) == "about 3 h 0 min"
    other = OtherStep("another kind", tmp_path / "other", [5], ())
    assert describe_remaining_time([*plan.steps, other]) == "at least 3 h 0 min"


def test_a_marker_of_another_key_or_a_damaged_one_does_not_count(plan: StudyPlan, tmp_path: Path) -> None:
    finish(plan, tmp_path)
    step = plan.steps[0]
    marker = json.loads(step.marker.read_text())
    step.marker.write_text(json.dumps({**marker, "key": "another"}))
    assert not step.is_finished()
    step.marker.write_text("half a no")
    assert finish(plan, tmp_path) == ["first"]


def test_files_that_another_process_made_meanwhile_are_not_finished(
    plan: StudyPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, folder = plan.steps[0], plan.steps[0].folder
    other = LoggedStep(step.name, folder, ["other settings"], ())
    beside = LoggedStep("audit", folder, ["beside"], ())

    def execute(running: LoggedStep, resources: StudyResources, progress: Progress) -> None:
        if running is step:
            for foreign in (other, beside):
                foreign.run(resources, progress)

    monkeypatch.setattr(LoggedStep, "execute", execute)
    step.run(StudyResources(tmp_path, "cpu"), silent)
    assert (step.is_finished(), other.is_finished(), beside.is_finished()) == (True, False, True)


def test_a_failed_step_stops_only_the_steps_that_need_it(plan: StudyPlan, tmp_path: Path) -> None:
    LoggedStep.broken.add("first")
    with pytest.raises(StudyError, match=r"(?s)2 of 4 steps.*first: no images"):
        finish(plan, tmp_path)
    assert LoggedStep.log == ["second", "fourth"]
    LoggedStep.broken.clear()
    assert finish(plan, tmp_path) == ["first", "third"]


def test_a_step_that_another_command_runs_is_waited_for_and_not_run_again(plan: StudyPlan, tmp_path: Path) -> None:
    messages: list[str] = []
    with step_lock(tmp_path, plan.steps[0]):
        other = Thread(target=finish, args=(plan, tmp_path), kwargs={"report": messages.append})
        other.start()
        while not any(text.startswith("waiting for first") for text in messages):
            assert other.is_alive()
        assert LoggedStep.log == []
        plan.steps[0].run(StudyResources(tmp_path, "cpu"), silent)
    other.join()
    assert LoggedStep.log == ["first", "second", "third", "fourth"]


@pytest.mark.parametrize("section", ["{}", "{train: false}"])
def test_a_network_that_its_target_cannot_take_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str
) -> None:
    def refuse(model: SwitchableModel, target: str | None) -> None:
        raise ExportError(f"{target} cannot take it")

    monkeypatch.setattr(model_steps, "check_for_target", refuse)
    file = write_study_file(tmp_path, recipe=RECIPE.replace("quant: {", "quant: {target: finn, "))
    with pytest.raises(StudyError, match="plain: finn cannot take it"):
        run(file, f"models={{plain: {section}}}", "attacks={}", "evaluations.main.attacks=[]")
    assert not list((tmp_path / "work").rglob("model.safetensors"))


@pytest.mark.slow
def test_the_audit_of_a_network_is_beside_its_report(tmp_path: Path) -> None:
    file = write_study_file(tmp_path)
    only = [
        "models.ptq=null",
        "models.fixed.scored=false",
        "budget.images=all",
        "attacks={}",
        "evaluations.main.attacks=[]",
    ]
    audit = "evaluations.main.audit={twin: fixed, precisions: [4], images: 20}"
    made = run(file, *only)
    assert made == ["train plain", "evaluate plain"]
    assert run(file, *only, audit) == ["train fixed-4", "audit plain"]
    (found,) = json.loads((tmp_path / "out" / "reports" / "plain" / "audit.json").read_text())
    assert found["model"] == "plain"
    assert run(file, *only, audit) == []


@pytest.mark.slow
def test_a_report_is_made_again_when_the_study_is_changed_and_changed_back(tmp_path: Path) -> None:
    file = write_study_file(tmp_path)
    only = ["models={plain: {}}", "attacks={}", "evaluations.main.attacks=[]"]

    def images(number: int) -> int:
        run(file, *only, f"budget.images={number}")
        return json.loads((tmp_path / "out" / "reports" / "plain" / "report.json").read_text())["data"]["images"]

    assert [images(12), images(6), images(12)] == [12, 6, 12]
    assert len(list((tmp_path / "out" / "reports" / "plain").glob("made-*.json"))) == 1
    assert run(file, *only) == []


@pytest.mark.slow
def test_an_interrupted_step_is_not_finished_even_with_the_files_of_earlier_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_study_file(tmp_path)
    only = ["models={plain: {}}", "attacks={}", "evaluations.main.attacks=[]"]
    run(file, *only)

    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(attack_steps, "make_report", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(file, *only, "budget.images=6")
    assert run(file, *only) == ["evaluate plain"]


@pytest.mark.slow
def test_a_report_and_the_audit_beside_it_have_markers_of_their_own(tmp_path: Path) -> None:
    file = write_study_file(tmp_path)
    only = ["models={plain: {}}", "budget.images=all", "attacks={}", "evaluations.main.attacks=[]"]
    only = [*only, "evaluations.main.audit={precisions: [4], images: 20}"]
    run(file, *only)
    _, plan, _ = plan_study(file, *only)
    (report,) = (step for step in plan.steps if step.name == "evaluate plain")
    report.marker.unlink()
    assert run(file, *only) == ["evaluate plain"]
    more = [*only, "evaluations.main.audit.images=21"]
    assert run(file, *more) == ["audit plain"]
    assert run(file, *only) == ["audit plain"]
    assert run(file, *only) == []


SIZE = "analyses={a: {analysis: {name: size, attack: {name: lavan, steps: 1}, sizes: [3]}, models: [plain]}}"
ANALYSIS = ["models={plain: {}}", "attacks={}", "evaluations={}", SIZE]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", ["budget.patch_images=12", "budget.held_out=6", "analyses.a.analysis.attack.steps=2"]
)
def test_an_analysis_is_run_again_for_other_patches(tmp_path: Path, change: str) -> None:
    file, folder = write_study_file(tmp_path), tmp_path / "out" / "analyses" / "a"
    run(file, *ANALYSIS)
    first = json.loads((folder / "analysis.json").read_text())
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert len(made) == 3
    assert run(file, *ANALYSIS, change) == ["analysis a"]
    other = json.loads((folder / "analysis.json").read_text())
    assert (other["made_of"], other["train"]) != (first["made_of"], first["train"])
    assert len(list(folder.rglob("*.safetensors"))) == 6
    # With the first settings again: measured again, on the first patches.
    assert run(file, *ANALYSIS) == ["analysis a"]
    assert json.loads((folder / "analysis.json").read_text())["records"] == first["records"]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}.items() >= made.items()


@pytest.mark.slow
def test_an_analysis_is_run_again_for_finished_patches_with_new_contents(tmp_path: Path) -> None:
    file = write_study_file(tmp_path)
    run(file, *ANALYSIS)
    (patch, other, _) = sorted((tmp_path / "out" / "analyses" / "a").rglob("*.safetensors"))
    (tmp_path / "given").mkdir()
    given = tmp_path / "given" / "mine.safetensors"
    taken = [*ANALYSIS, f"analyses.a.analysis.patches=['{given.parent}']"]
    # Missing patches are no mistake of the plan.
    plan_study(file, *taken)
    given.write_bytes(patch.read_bytes())
    assert run(file, *taken) == ["analysis a"]
    assert run(file, *taken) == []
    given.write_bytes(other.read_bytes())
    assert run(file, *taken) == ["analysis a"]


@pytest.mark.slow
def test_another_study_uses_the_same_networks_and_patches(tmp_path: Path) -> None:
    run(write_study_file(tmp_path), scale="smoke")
    (tmp_path / "second").mkdir()
    other = write_study_file(tmp_path / "second")
    (tmp_path / "second" / "tiny.yaml").unlink()
    other.write_text(other.read_text().replace("second/tiny.yaml", "tiny.yaml"))
    made = run(other, work=tmp_path / "work")
    assert made == [
        "evaluate plain",
        "evaluate fixed-4",
        "convert ptq",
        "make patches: lavan on ptq at 32",
        "make patches: lavan on ptq at 4",
        "evaluate ptq",
    ]


@pytest.mark.slow
def test_an_interrupted_study_resumes_with_the_cells_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_study_file(tmp_path)
    real = attack_steps.compute

    def interrupt(jobs: list, *args: object, **options: object) -> None:
        real(jobs[:3], *args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(attack_steps, "compute", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(file, scale="smoke")
    _, plan, work = plan_study(file, scale="smoke")
    assert len(list((work / "cells").iterdir())) == 3
    kept = {path: path.stat().st_mtime_ns for path in work.rglob("*.safetensors")}
    monkeypatch.setattr(attack_steps, "compute", real)
    assert run(file, scale="smoke")[0] == "evaluate plain"
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert all(step.is_finished() for step in plan.steps)


@pytest.mark.slow
def test_interrupting_a_training_interrupts_the_study_and_loses_no_training_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_study_file(tmp_path)
    _, plan, work = plan_study(file, scale="smoke")

    def interrupt_first_step(observer: object, record: StepRecord) -> None:
        if record.step == 1:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "on_step", interrupt_first_step)
        with pytest.raises(Interrupted, match="step 2"):
            run(file, scale="smoke")
    assert len(list((work / "runs").iterdir())) == 1
    assert not any(step.is_finished() for step in plan.steps)
    steps: list[int] = []
    monkeypatch.setattr(TrainingProgress, "on_start", lambda observer, step, **rest: steps.append(step))
    assert run(file, scale="smoke")[0] == plan.steps[0].name
    assert steps[0] == 2


@pytest.mark.slow
def test_a_run_of_another_recipe_is_refused_and_kept(tmp_path: Path) -> None:
    file = write_study_file(tmp_path)
    _, plan, _ = plan_study(file, scale="smoke")
    folder = plan.steps[0].folder
    (folder / "last").mkdir(parents=True)
    (folder / "recipe.yaml").write_text("seed: 7\n")
    with pytest.raises(StudyError, match=r"train plain: .*another recipe"):
        run(file, scale="smoke")
    assert (folder / "recipe.yaml").read_text() == "seed: 7\n"
