"""Carrying out: each part once, after what it needs, whatever fails or is stopped, by one process or several."""

from __future__ import annotations

import csv
import json
import signal
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest

from qadtr_brevitas.core.errors import DataError, StudyError
from qadtr_brevitas.evaluation.sharding import Shard
from qadtr_brevitas.reproduce.study import models
from qadtr_brevitas.reproduce.study.claims import Claims
from qadtr_brevitas.reproduce.study.plan import StudyPlan
from qadtr_brevitas.reproduce.study.resources import StudyResources
from qadtr_brevitas.reproduce.study.run import carry_out
from qadtr_brevitas.reproduce.study.steps import Progress, StudyStep
from qadtr_brevitas.reproduce.study.summary import write_study as write_summary
from qadtr_brevitas.training.log import StepRecord
from qadtr_brevitas.training.stop import Interrupted
from tests.reproduce.study.support import planned, run, write_study


@dataclass(frozen=True)
class Note(StudyStep):
    """Writes a word; `log` has them in the order in which they were made."""

    log: ClassVar[list[str]] = []
    broken: ClassVar[set[str]] = set()

    def work(self, resources: StudyResources, progress: Progress) -> None:
        if self.name in self.broken:
            raise DataError("no images")
        self.log.append(self.name)
        progress(1, 1, "")


@pytest.fixture
def plan(tmp_path: Path) -> StudyPlan:
    Note.log.clear()
    Note.broken.clear()
    first = Note("first", tmp_path / "first", [1], ())
    second = Note("second", tmp_path / "second", [2], ())
    third = Note("third", tmp_path / "third", [3], (first, second))
    fourth = Note("fourth", tmp_path / "fourth", [4], (second,))
    return StudyPlan((first, second, third, fourth), (), ())


def carry(plan: StudyPlan, folder: Path, **options: object) -> list[str]:
    claims = Claims(folder / "claims")
    return carry_out(plan, StudyResources(folder, "cpu"), claims, look_every=0.01, **options).made


def test_parts_are_made_once_after_what_they_need(plan: StudyPlan, tmp_path: Path) -> None:
    assert carry(plan, tmp_path) == Note.log == ["first", "second", "third", "fourth"]
    assert carry(plan, tmp_path) == []


def test_a_share_begins_elsewhere_and_still_makes_everything(plan: StudyPlan, tmp_path: Path) -> None:
    assert carry(plan, tmp_path, share=Shard(2, 2)) == ["second", "fourth", "first", "third"]


def test_a_note_of_something_else_does_not_count(plan: StudyPlan, tmp_path: Path) -> None:
    carry(plan, tmp_path)
    part = plan.parts[0]
    part.note.write_text(json.dumps({"key": "another"}))
    assert not part.is_made()
    part.note.write_text("half a no")
    assert carry(plan, tmp_path) == ["first"]


def test_what_another_process_made_here_meanwhile_is_not_finished(
    plan: StudyPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, here = plan.parts[0], plan.parts[0].folder
    other = Note(part.name, here, ["other settings"], ())
    beside = Note("audit", here, ["beside"], ())

    def work(mine: Note, resources: StudyResources, progress: Progress) -> None:
        if mine is part:
            for foreign in (other, beside):
                foreign.make(resources, progress)

    monkeypatch.setattr(Note, "work", work)
    part.make(StudyResources(tmp_path, "cpu"), lambda done, total, note: None)
    assert (part.is_made(), other.is_made(), beside.is_made()) == (True, False, True)


def test_a_failed_part_does_not_keep_others_from_being_made(plan: StudyPlan, tmp_path: Path) -> None:
    Note.broken.add("first")
    with pytest.raises(StudyError, match=r"(?s)2 of 4 parts of the study could not be made.*first: no images"):
        carry(plan, tmp_path)
    assert Note.log == ["second", "fourth"]
    Note.broken.clear()
    assert carry(plan, tmp_path) == ["first", "third"]


def test_two_processes_make_nothing_twice(plan: StudyPlan, tmp_path: Path) -> None:
    said: list[str] = []
    with Claims(tmp_path / "claims").claim(plan.parts[0].key, "first"):
        other = Thread(target=carry, args=(plan, tmp_path), kwargs={"say": said.append})
        other.start()
        while not any(text.startswith("waiting for first (process") for text in said):
            assert other.is_alive()
        assert Note.log == ["second", "fourth"]
    other.join()
    assert Note.log == ["second", "fourth", "first", "third"]


def test_a_whole_study(tmp_path: Path) -> None:
    file = write_study(tmp_path)
    study, plan, work = planned(file)
    made = run(file).made
    assert [name.split(":")[0] for name in made if "model" not in name][:2] == ["train plain", "make patches"]
    assert sorted(path.name for path in (work / "runs").iterdir()) == sorted(
        part.folder.name for part in plan.parts if part.name in ("train plain", "train fixed-4")
    )
    written = write_summary(study, plan, tmp_path / "out", scale="small", command="qadtr-brevitas study x")
    assert all(path.is_file() for path in written)
    facts = json.loads((tmp_path / "out" / "study.json").read_text())
    assert facts["reports"] == ["reports/plain", "reports/fixed-4", "reports/ptq"]
    assert facts["rows"]["fixed-4"] == {
        "label": "Fixed",
        "paper": None,
        "seed": 0,
        "model": "fixed",
        "evaluation": "main",
        "precision": "4",
    }
    figures = (tmp_path / "out" / "figures.csv").read_text().splitlines()
    assert figures[0].startswith("model,label,evaluation,seed,precision,what,threat,made_on,made_at")
    rows = list(csv.DictReader(figures))
    found = {(row["model"], row["precision"], row["what"]): row for row in rows}
    assert {row["what"] for row in rows} >= {"clean accuracy", "random patch"}
    patch = found["plain", "4", "lavan, white-box"]
    assert (patch["made_on"], patch["made_at"], patch["threat"]) == ("plain", "4", "white-box")
    assert ("plain", "4", "lavan, made at 32") in found
    # Accuracy under an attack on every pixel is what it leaves of the clean accuracy.
    attacked = found["fixed", "4", "pgd steps=1, white-box: accuracy"]
    clean = found["fixed", "4", "clean accuracy"]
    assert int(attacked["n"]) == int(clean["n"]) == 12
    assert float(attacked["value"]) <= float(clean["value"])
    assert float(clean["value"]) == int(clean["count"]) / 12
    assert run(file).made == []


def test_networks_are_audited_beside_their_report(tmp_path: Path) -> None:
    file = write_study(tmp_path)
    only = [
        "models.ptq=null",
        "models.fixed.scored=false",
        "budget.images=all",
        "attacks={}",
        "evaluations.main.attacks=[]",
    ]
    audit = "evaluations.main.audit={twin: fixed, precisions: [4], images: 20}"
    made = run(file, *only).made
    assert made == ["train plain", "evaluate plain"]
    assert run(file, *only, audit).made == ["train fixed-4", "audit plain"]
    (found,) = json.loads((tmp_path / "out" / "reports" / "plain" / "audit.json").read_text())
    assert found["model"] == "plain"
    assert run(file, *only, audit).made == []


def test_a_study_that_is_changed_and_changed_back_is_not_taken_for_finished(tmp_path: Path) -> None:
    file = write_study(tmp_path)
    only = ["models={plain: {}}", "attacks={}", "evaluations.main.attacks=[]"]

    def images(number: int) -> int:
        run(file, *only, f"budget.images={number}")
        return json.loads((tmp_path / "out" / "reports" / "plain" / "report.json").read_text())["data"]["images"]

    assert [images(12), images(6), images(12)] == [12, 6, 12]
    assert len(list((tmp_path / "out" / "reports" / "plain").glob("made-*.json"))) == 1
    assert run(file, *only).made == []


def test_a_stop_in_between_leaves_nothing_that_counts_as_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qadtr_brevitas.reproduce.study import attacks

    file = write_study(tmp_path)
    only = ["models={plain: {}}", "attacks={}", "evaluations.main.attacks=[]"]
    run(file, *only)

    def stopped(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(attacks, "make_report", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(file, *only, "budget.images=6")
    assert run(file, *only).made == ["evaluate plain"]


def test_a_report_and_the_audit_beside_it_are_told_apart(tmp_path: Path) -> None:
    file = write_study(tmp_path)
    only = ["models={plain: {}}", "budget.images=all", "attacks={}", "evaluations.main.attacks=[]"]
    only = [*only, "evaluations.main.audit={precisions: [4], images: 20}"]
    run(file, *only)
    _, plan, _ = planned(file, *only)
    (report,) = (part for part in plan.parts if part.name == "evaluate plain")
    report.note.unlink()
    assert run(file, *only).made == ["evaluate plain"]
    more = [*only, "evaluations.main.audit.images=21"]
    assert run(file, *more).made == ["audit plain"]
    assert run(file, *only).made == ["audit plain"]
    assert run(file, *only).made == []


SIZE = "analyses={a: {analysis: {name: size, attack: {name: lavan, steps: 1}, sizes: [3]}, models: [plain]}}"
ANALYSIS = ["models={plain: {}}", "attacks={}", "evaluations={}", SIZE]


@pytest.mark.parametrize(
    "change", ["budget.patch_images=12", "budget.held_out=6", "analyses.a.analysis.attack.steps=2"]
)
def test_an_analysis_of_other_patches_is_another(tmp_path: Path, change: str) -> None:
    file, folder = write_study(tmp_path), tmp_path / "out" / "analyses" / "a"
    run(file, *ANALYSIS)
    first = json.loads((folder / "analysis.json").read_text())
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert len(made) == 3
    assert run(file, *ANALYSIS, change).made == ["analysis a"]
    other = json.loads((folder / "analysis.json").read_text())
    assert (other["made_of"], other["train"]) != (first["made_of"], first["train"])
    assert len(list(folder.rglob("*.safetensors"))) == 6
    # Back again: measured anew, on the patches of the first time.
    assert run(file, *ANALYSIS).made == ["analysis a"]
    assert json.loads((folder / "analysis.json").read_text())["records"] == first["records"]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}.items() >= made.items()


def test_an_analysis_of_finished_patches_is_another_when_they_are_remade(tmp_path: Path) -> None:
    file = write_study(tmp_path)
    run(file, *ANALYSIS)
    (patch, other, _) = sorted((tmp_path / "out" / "analyses" / "a").rglob("*.safetensors"))
    (tmp_path / "given").mkdir()
    given = tmp_path / "given" / "mine.safetensors"
    taken = [*ANALYSIS, f"analyses.a.analysis.patches=['{given.parent}']"]
    # Whether they are there is told where they are needed.
    planned(file, *taken)
    given.write_bytes(patch.read_bytes())
    assert run(file, *taken).made == ["analysis a"]
    assert run(file, *taken).made == []
    given.write_bytes(other.read_bytes())
    assert run(file, *taken).made == ["analysis a"]


def test_another_study_uses_what_is_there(tmp_path: Path) -> None:
    run(write_study(tmp_path), scale="smoke")
    (tmp_path / "second").mkdir()
    other = write_study(tmp_path / "second")
    (tmp_path / "second" / "tiny.yaml").unlink()
    other.write_text(other.read_text().replace("second/tiny.yaml", "tiny.yaml"))
    made = run(other, work=tmp_path / "work").made
    assert made == [
        "evaluate plain",
        "evaluate fixed-4",
        "convert ptq",
        "make patches: lavan on ptq at 32",
        "make patches: lavan on ptq at 4",
        "evaluate ptq",
    ]


def test_a_study_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qadtr_brevitas.reproduce.study import attacks

    file = write_study(tmp_path)
    real = attacks.compute

    def stopped(jobs: list, *args: object, **options: object) -> None:
        real(jobs[:3], *args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(attacks, "compute", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(file, scale="smoke")
    _, plan, work = planned(file, scale="smoke")
    assert len(list((work / "cells").iterdir())) == 3
    kept = {path: path.stat().st_mtime_ns for path in work.rglob("*.safetensors")}
    monkeypatch.setattr(attacks, "compute", real)
    assert run(file, scale="smoke").made[0] == "evaluate plain"
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert all(part.is_made() for part in plan.parts)


def test_a_stop_in_a_training_stops_the_study_and_loses_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_study(tmp_path)
    _, plan, work = planned(file, scale="smoke")

    def stop_in_the_first_step(teller: object, record: StepRecord) -> None:
        if record.step == 1:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(models._Teller, "on_step", stop_in_the_first_step)
        with pytest.raises(Interrupted, match=r"stopped after step 2; the state is saved in .*: the same"):
            run(file, scale="smoke")
    assert len(list((work / "runs").iterdir())) == 1
    assert not any(part.is_made() for part in plan.parts)
    steps: list[int] = []
    monkeypatch.setattr(models._Teller, "on_start", lambda teller, step, **rest: steps.append(step))
    assert run(file, scale="smoke").made[0] == plan.parts[0].name
    assert steps[0] == 2


def test_a_run_of_another_version_is_told_and_kept(tmp_path: Path) -> None:
    file = write_study(tmp_path)
    _, plan, _ = planned(file, scale="smoke")
    folder = plan.parts[0].folder
    (folder / "last").mkdir(parents=True)
    (folder / "recipe.yaml").write_text("seed: 7\n")
    with pytest.raises(StudyError, match=r"train plain: .* holds a run of another recipe, which differs in"):
        run(file, scale="smoke")
    assert (folder / "recipe.yaml").read_text() == "seed: 7\n"
