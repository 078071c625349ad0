"""Reading studies: scales, bases and changes, and every mistake with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from qadtr_brevitas.core.errors import CheckpointError, RecipeError, UsageError
from qadtr_brevitas.reproduce.study.file import dump_json, find_study, load_study
from qadtr_brevitas.reproduce.study.networks import make_nets
from tests.reproduce.study.support import STUDY, write_study


def mistakes(file: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_study(file, overrides)
    return str(caught.value)


def changed(folder: Path, old: str, new: str) -> Path:
    assert old in STUDY
    return write_study(folder, study=STUDY.replace(old, new))


def test_a_scale_changes_the_rest_of_the_file(tmp_path: Path) -> None:
    file = write_study(tmp_path)
    assert set(load_study(file).models) == {"plain", "fixed", "ptq"}
    assert set(load_study(file, scale="smoke").models) == {"plain", "fixed"}
    with pytest.raises(UsageError, match=r"has no scale 'smal': did you mean 'small'"):
        load_study(file, scale="smal")
    with pytest.raises(UsageError, match=r"has no scale 'full': choose from small, smoke"):
        load_study(file, scale="full")


def test_changes_from_the_command_line(tmp_path: Path) -> None:
    file = write_study(tmp_path)
    study = load_study(file, ["budget.images=all", "seeds=[3,4]", "models.plain.set={train.epochs: 1}"])
    assert (study.budget.images, study.seeds, study.models["plain"].set) == ("all", (3, 4), {"train.epochs": 1})
    assert "ptq" not in load_study(file, ["models.ptq=null"]).models
    assert "is no override: write key=value" in mistakes(file, "budget")
    assert "precisions is a single value or a list" in mistakes(file, "precisions.0=3")
    assert "is not YAML" in mistakes(file, "seeds=[1")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("models.ptqq", "models.ptqq: there is no 'ptqq' to take out: did you mean 'ptq'?"),
        ("models.palin.label", "models.palin.label: there is no 'palin' to take out: did you mean 'plain'?"),
        ("models.plain.lable", "models.plain.lable: there is no 'lable' to take out: did you mean 'label'?"),
        ("evaluations.mian", "there is no 'mian' to take out: did you mean 'main'?"),
        ("evaluations.main.audit.twni", "there is no 'twni' to take out: did you mean 'twin'?"),
        ("attacks.lavan.attack.stesp", "there is no 'stesp' to take out: did you mean 'steps'?"),
        ("budgte", "there is no 'budgte' to take out: did you mean 'budget'?"),
        ("analyses.pixel", "there is no 'pixel' to take out: there is none to choose from"),
        ("models.plain.set.train", "there is no 'train' to take out"),
        ("models.fixed.each.0", "each is a single value or a list, it has no keys"),
    ],
)
def test_what_is_not_there_cannot_be_taken_out(tmp_path: Path, key: str, message: str) -> None:
    assert message in mistakes(write_study(tmp_path), f"{key}=null")


@pytest.mark.parametrize(
    "key",
    [
        "seeds",
        "analyses",
        "budget.steps",
        "models.fixed.label",
        "evaluations.main.eot",
        "evaluations.main.audit",
        "evaluations.main.audit.twin",
        "attacks.pgd.attack.alpha",
        "attacks.pgd.attack.steps",
    ],
)
def test_what_may_be_there_can_be_taken_out(tmp_path: Path, key: str) -> None:
    load_study(write_study(tmp_path), [f"{key}=null"])


def test_what_a_base_or_a_scale_says_can_be_taken_out(tmp_path: Path) -> None:
    write_study(tmp_path)
    (tmp_path / "above.yaml").write_text(
        "base: tiny_study\nevaluations: {main: {audit: {twin: plain}}}\n"
        "scales: {smoke: {evaluations: {main: {audit: {images: 50}}}}}\n"
    )
    (tmp_path / "top.yaml").write_text("base: above\n")
    for scale in ("small", "smoke"):
        assert load_study(tmp_path / "top.yaml", scale=scale).evaluations["main"].audit is not None
        without = load_study(tmp_path / "top.yaml", ["evaluations.main.audit=null"], scale=scale)
        assert without.evaluations["main"].audit is None
    audit = (
        load_study(tmp_path / "top.yaml", ["evaluations.main.audit.twin=null"], scale="smoke").evaluations["main"].audit
    )
    assert audit is not None
    assert (audit.twin, audit.images) == (None, 50)


def test_a_null_in_set_is_what_a_recipe_gets(tmp_path: Path) -> None:
    study = STUDY.replace("models: {{ptq: null}}", "models: {{plain: {{set: {{train.attack: null}}}}}}")
    file = write_study(tmp_path, study=study)
    assert load_study(file, scale="smoke").models["plain"].set == {"train.attack": None}


def test_a_study_as_it_was_run_reads_back_equal(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path))
    (tmp_path / "again.yaml").write_text(f"# As it was run.\n{dump_json(study)}")
    assert load_study(tmp_path / "again.yaml") == study


def test_all_mistakes_are_named_with_their_line(tmp_path: Path) -> None:
    text = STUDY.replace("title: A tiny study", "titel: A tiny study").replace("label: Plain", "lable: Plain")
    found = mistakes(write_study(tmp_path, study=text))
    assert "tiny_study.yaml:2: titel: unknown key 'titel': did you mean 'title'?" in found
    assert "tiny_study.yaml:6: models.plain.lable: unknown key 'lable': did you mean 'label'?" in found


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("attacks: [lavan, pgd]", "attacks: [lavan, pdg]", "there is no 'pdg' in this study: did you mean 'pgd'"),
        ("start: plain, train", "start: plane, train", "there is no 'plane' in this study: did you mean 'plain'"),
        ("{{label: Plain}}", "{{start: fixed}}", "starts from itself: leave out one start"),
        (
            "{{label: Plain}}",
            "{{path: x, defense: at}}",
            "a finished model is not made anew: leave out defense, or path",
        ),
        ("main: {{", "main: {{models: [fixd], ", "there is no 'fixd' in this study: did you mean 'fixed'"),
        ("main: {{", "main: {{audit: {{twin: plane}}, ", "there is no 'plane' in this study: did you mean 'plain'"),
        ("main: {{", "main: {{eot: [8+x], ", "cannot be read"),
        ("[lavan, pgd]}}", "[pgd], protocol: unseen}}", "a protocol starts from the first attack, which must make"),
        ("steps: 1}}}}", "steps: 1}}, per_image: false}}", "this attack cannot make universal patches"),
        ("steps: 1}}}}", "steps: 1}}, made_at: [4]}}", "every precision that is scored: leave out made_at"),
        ("steps: 3}}", "steps: 3}}, made_on: [fixedd]", "there is no 'fixedd' in this study: did you mean 'fixed'"),
        ("recipe: {recipe}", "seeds: [0]", "needs a recipe of its own, as the study names none"),
        ("budget:", "analyses: {{a: {{analysis: sptial, models: [plain]}}}}\nbudget:", "did you mean 'spatial'"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert message in mistakes(changed(tmp_path, old, new))


def test_an_unknown_study_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="there is no study 'table99': did you mean 'table"):
        find_study("table99")


def test_a_recipe_that_is_missing_or_wrong_is_told_with_its_model(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"(?s)model plain of the study, which is nowhere.*there is no recipe 'nowhere'"
    ):
        make_nets(load_study(write_study(tmp_path), ["models.plain.recipe=nowhere"]))
    with pytest.raises(UsageError, match=r"(?s)model plain of the study.*train.epochs: must be at least 1, got 0"):
        make_nets(load_study(write_study(tmp_path), ["models.plain.set={train.epochs: 0}"]))
    with pytest.raises(UsageError, match=r"(?s)model ptq of the study.*there is no defense 'pbatt'"):
        make_nets(load_study(write_study(tmp_path), ["models.ptq.defense=pbatt"]))


def test_a_network_is_known_by_what_makes_it(tmp_path: Path) -> None:
    file = write_study(tmp_path)
    nets = make_nets(load_study(file))
    assert list(nets) == ["plain", "fixed-4", "ptq"]
    assert len({net.key for net in nets.values()}) == 3
    renamed = make_nets(load_study(file, ["models.other={}", "title=Another"]))
    assert renamed["other"].key == nets["plain"].key
    # What a network starts from is a part of what makes it.
    longer = make_nets(load_study(file, ["models.plain.set={train.epochs: 3}"]))
    assert longer["ptq"].key != nets["ptq"].key
    seeds = make_nets(load_study(file, ["seeds=[0,1]", "models.plain.seeds=[0]"]))
    assert list(seeds) == ["plain", "fixed-4-s0", "fixed-4-s1", "ptq-s0", "ptq-s1"]
    assert seeds["fixed-4-s1"].start is seeds["plain"]
    assert seeds["fixed-4-s0"].key == nets["fixed-4"].key


def test_a_finished_model_has_to_be_there(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path), ["models={plain: {path: runs/gone}}"])
    with pytest.raises(
        CheckpointError, match=r"there is no finished model in runs/gone: give a run or model directory"
    ):
        _ = make_nets(study)["plain"].key
