"""The plan of a study: the steps it needs and no others, under the names that the study gives them."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.reproduce.study.attack_steps import EvaluationStep, PatchStep
from qadtr_brevitas.reproduce.study.file import load_study
from qadtr_brevitas.reproduce.study.networks import make_networks
from qadtr_brevitas.reproduce.study.plan import StudyPlan, make_plan
from qadtr_brevitas.reproduce.study.scores import UNSEEN_PREFIX
from qadtr_brevitas.reproduce.study.summary import write_study
from tests.reproduce.study.support import STUDY, plan_study, run, write_study_file

KINDS = {"6x6", "10x10", "12x12", "disc", "dpr", "other-target", "gap", "left-out-bits"}
ATTACKS = """attacks:
  lavan: {{attack: {{name: lavan, size: 4, steps: 1}}, targets: [0], made_at: [4]}}
  gap: {{attack: {{name: gap, size: 4, steps: 1, shape: square}}, targets: [0], made_at: [4]}}
  dpr: {{attack: {{name: dpr, size: 4, steps: 1}}, targets: [0], made_at: [4]}}
evaluations:
  seen: {{attacks: [gap, dpr]}}
  unseen: {{attacks: [lavan, gap], protocol: unseen}}
budget:"""
PROTOCOL = f"{STUDY.partition('attacks:')[0]}{ATTACKS}{STUDY.partition('budget:')[2]}"


def shipped(name: str, scale: str) -> StudyPlan:
    return make_plan(load_study(name, scale=scale), work=Path("work"), output=Path("out"))


def patches(step: EvaluationStep) -> list[tuple[str, str, str]]:
    return [(patch.label, patch.source, str(patch.mode)) for patch in step.patches]


def test_the_protocol_keeps_its_names_and_shares_equal_patches_with_another_evaluation() -> None:
    plan = shipped("cifar10_defenses", "small")
    rows = [row for row in plan.evaluations if row.evaluation == "unseen"]
    assert len(rows) == 15
    for row in rows:
        assert {label for label, _, _ in patches(row.step)} == {f"{UNSEEN_PREFIX}{kind}" for kind in KINDS}
    seen = next(row for row in plan.evaluations if (row.network.name, row.evaluation) == ("qadtr", "seen"))
    unseen = next(row for row in rows if row.network.name == "qadtr")
    found = {step.label: step.key for step in (*seen.step.patches, *unseen.step.patches) if str(step.mode) == "4"}
    assert (found["gap"], found["dpr"]) == (found["unseen gap"], found["unseen dpr"])


@pytest.mark.parametrize("name", ["cifar10_defenses", "table11", "table15"])
@pytest.mark.parametrize("scale", ["smoke", "small"])
def test_every_patch_is_used_by_a_report(name: str, scale: str) -> None:
    plan = shipped(name, scale)
    used = {patch.key for row in plan.evaluations for patch in row.step.patches}
    assert {step.key for step in plan.steps if isinstance(step, PatchStep)} == used


def test_other_attacks_are_made_beside_those_of_the_protocol(tmp_path: Path) -> None:
    _, plan, _ = plan_study(write_study_file(tmp_path, study=PROTOCOL))
    row = next(row for row in plan.evaluations if (row.network.name, row.evaluation) == ("plain", "unseen"))
    made = Counter(label for label, _, _ in patches(row.step))
    assert made == {"gap": 1, **{f"unseen {kind}": 1 for kind in KINDS}}


def test_the_protocol_is_made_on_the_networks_of_its_attack(tmp_path: Path) -> None:
    file = write_study_file(tmp_path, study=PROTOCOL)
    _, plan, _ = plan_study(file, "attacks.lavan.made_on=[ptq]", "evaluations.unseen.models=[plain]")
    (row,) = (row for row in plan.evaluations if row.evaluation == "unseen")
    sources = {source for label, source, _ in patches(row.step) if label.startswith(UNSEEN_PREFIX)}
    assert sources == {"ptq"}


@pytest.mark.slow
def test_models_made_alike_are_made_once_and_keep_their_names(tmp_path: Path) -> None:
    file = write_study_file(tmp_path)
    (tmp_path / "again.yaml").write_text((tmp_path / "tiny.yaml").read_text())
    two = [
        f"models={{one: {{}}, two: {{recipe: {tmp_path / 'again.yaml'}}}, three: {{defense: fixed, start: two}}}}",
        "attacks.pgd.made_on=[two]",
    ]
    study, plan, _ = plan_study(file, *two)
    one, other, _ = plan.evaluations
    assert patches(one.step) == [("lavan", "one", "32"), ("lavan", "one", "4")]
    assert patches(other.step) == [("lavan", "two", "32"), ("lavan", "two", "4")]
    assert [step.key for step in one.step.patches] == [step.key for step in other.step.patches]
    # The name of the network in the report is part of the key.
    assert one.step.key != other.step.key
    made = run(file, *two)
    assert [name for name in made if name.startswith("train")] == ["train one", "train three"]
    assert [name for name in made if name.startswith("make patches")] == [
        "make patches: lavan on one at 32",
        "make patches: lavan on one at 4",
        "make patches: lavan on three at 4",
    ]
    assert [name for name in made if name.startswith("evaluate")] == ["evaluate one", "evaluate two", "evaluate three"]
    write_study(study, plan, tmp_path / "out", scale="small", command="")
    rows = list(csv.DictReader((tmp_path / "out" / "figures.csv").read_text().splitlines()))
    assert {(row["model"], row["made_on"]) for row in rows if row["what"] == "lavan, white-box"} == {
        ("one", "one"),
        ("two", "two"),
        ("three", "three"),
    }


@pytest.mark.parametrize(
    ("models", "network"),
    [
        ("{qat: {each: [32, 4]}, qat-4: {}}", "qat-4"),
        ("{a: {seeds: [0, 1]}, a-s1: {}}", "a-s1"),
    ],
)
def test_two_networks_of_one_name_are_refused(tmp_path: Path, models: str, network: str) -> None:
    study = load_study(write_study_file(tmp_path), [f"models={models}"])
    with pytest.raises(UsageError, match=rf"models \w+ and {network} .* network called {network}"):
        make_networks(study)


def test_two_reports_in_one_folder_are_refused(tmp_path: Path) -> None:
    file = write_study_file(tmp_path)
    clash = ["models={a: {}, a-b: {}}", "evaluations={b-c: {}, c: {}}"]
    with pytest.raises(UsageError, match=r"'a b-c' and 'a-b c'.*a-b-c: rename a model"):
        plan_study(file, *clash)
    _, plan, _ = plan_study(file, clash[0], "evaluations={c: {}, d: {}}")
    assert len({row.step.folder for row in plan.evaluations}) == 4
