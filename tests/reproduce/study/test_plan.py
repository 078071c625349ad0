"""From a study to its parts: what is needed and nothing else, each under the names that the study gives it."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.reproduce.study.attack_steps import EvaluationStep, PatchStep
from qadtr_brevitas.reproduce.study.file import load_study
from qadtr_brevitas.reproduce.study.networks import make_nets
from qadtr_brevitas.reproduce.study.plan import StudyPlan, make_plan
from qadtr_brevitas.reproduce.study.summary import MEAN_UNSEEN, UNSEEN
from qadtr_brevitas.reproduce.study.summary import write_study as write_summary
from tests.reproduce.study.support import STUDY, planned, run, write_study

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


def patches(part: EvaluationStep) -> list[tuple[str, str, str]]:
    return [(patch.label, patch.source, str(patch.mode)) for patch in part.patches]


def test_the_protocol_keeps_its_names_where_the_study_has_the_same_patches() -> None:
    plan = shipped("cifar10_defenses", "small")
    rows = [row for row in plan.rows if row.evaluation == "unseen"]
    assert len(rows) == 11
    for row in rows:
        assert {label for label, _, _ in patches(row.part)} == {f"{UNSEEN}{kind}" for kind in KINDS}
    # They are made once, for both evaluations.
    seen = next(row for row in plan.rows if (row.net.name, row.evaluation) == ("qadtr", "seen"))
    unseen = next(row for row in rows if row.net.name == "qadtr")
    found = {part.label: part.key for part in (*seen.part.patches, *unseen.part.patches) if str(part.mode) == "4"}
    assert (found["gap"], found["dpr"]) == (found["unseen gap"], found["unseen dpr"])


@pytest.mark.parametrize("name", ["cifar10_defenses", "table11", "table15"])
@pytest.mark.parametrize("scale", ["smoke", "small"])
def test_no_patch_is_made_that_no_report_uses(name: str, scale: str) -> None:
    plan = shipped(name, scale)
    used = {patch.key for row in plan.rows for patch in row.part.patches}
    assert {part.key for part in plan.parts if isinstance(part, PatchStep)} == used


def test_other_attacks_stand_beside_those_of_the_protocol(tmp_path: Path) -> None:
    _, plan, _ = planned(write_study(tmp_path, study=PROTOCOL))
    row = next(row for row in plan.rows if (row.net.name, row.evaluation) == ("plain", "unseen"))
    made = Counter(label for label, _, _ in patches(row.part))
    assert made == {"gap": 1, **{f"unseen {kind}": 1 for kind in KINDS}}


def test_the_protocol_is_made_where_its_attack_would_be(tmp_path: Path) -> None:
    file = write_study(tmp_path, study=PROTOCOL)
    _, plan, _ = planned(file, "attacks.lavan.made_on=[ptq]", "evaluations.unseen.models=[plain]")
    (row,) = (row for row in plan.rows if row.evaluation == "unseen")
    sources = {source for label, source, _ in patches(row.part) if label.startswith(UNSEEN)}
    assert sources == {"ptq"}


def test_the_mean_of_unseen_patches_is_of_all_kinds(tmp_path: Path) -> None:
    file = write_study(tmp_path, study=PROTOCOL)
    only = ["models.fixed=null", "models.ptq=null"]
    study, plan, _ = planned(file, *only)
    run(file, *only)
    write_summary(study, plan, tmp_path / "out", scale="small", command="")
    rows = list(csv.DictReader((tmp_path / "out" / "figures.csv").read_text().splitlines()))
    (mean,) = (row for row in rows if (row["what"], row["precision"]) == (MEAN_UNSEEN, "4"))
    assert int(mean["targets"]) == len(KINDS)
    single = {row["what"]: float(row["value"]) for row in rows if row["precision"] == "4"}
    assert single["unseen gap, white-box"] == single["gap, white-box"]


def test_models_made_alike_are_made_once_and_keep_their_names(tmp_path: Path) -> None:
    file = write_study(tmp_path)
    (tmp_path / "again.yaml").write_text((tmp_path / "tiny.yaml").read_text())
    two = [
        f"models={{one: {{}}, two: {{recipe: {tmp_path / 'again.yaml'}}}, three: {{defense: fixed, start: two}}}}",
        "attacks.pgd.made_on=[two]",
    ]
    study, plan, _ = planned(file, *two)
    one, other, _ = plan.rows
    assert patches(one.part) == [("lavan", "one", "32"), ("lavan", "one", "4")]
    assert patches(other.part) == [("lavan", "two", "32"), ("lavan", "two", "4")]
    assert [part.key for part in one.part.patches] == [part.key for part in other.part.patches]
    # What a report says it is of decides whether it is there.
    assert one.part.key != other.part.key
    made = run(file, *two).made
    assert [name for name in made if name.startswith("train")] == ["train one", "train three"]
    assert [name for name in made if name.startswith("make patches")] == [
        "make patches: lavan on one at 32",
        "make patches: lavan on one at 4",
        "make patches: lavan on three at 4",
    ]
    assert [name for name in made if name.startswith("evaluate")] == ["evaluate one", "evaluate two", "evaluate three"]
    write_summary(study, plan, tmp_path / "out", scale="small", command="")
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
    study = load_study(write_study(tmp_path), [f"models={models}"])
    with pytest.raises(
        UsageError, match=rf"models \w+ and {network} of the study both have a network called {network}"
    ):
        make_nets(study)


def test_two_reports_in_one_folder_are_refused(tmp_path: Path) -> None:
    file = write_study(tmp_path)
    clash = ["models={a: {}, a-b: {}}", "evaluations={b-c: {}, c: {}}"]
    with pytest.raises(UsageError, match=r"'a b-c' and 'a-b c', .* both have their report in .*a-b-c: rename a model"):
        planned(file, *clash)
    _, plan, _ = planned(file, clash[0], "evaluations={c: {}, d: {}}")
    assert len({row.part.folder for row in plan.rows}) == 4
