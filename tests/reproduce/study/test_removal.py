"""Removing keys of a study: what may be there can be removed, anything else is a mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from qadtr_brevitas.reproduce.study.file import load_study
from tests.reproduce.study.support import STUDY, mistakes, write_study_file


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("models.ptqq", "models.ptqq: there is no 'ptqq' to remove: did you mean 'ptq'?"),
        ("models.palin.label", "models.palin.label: there is no 'palin' to remove: did you mean 'plain'?"),
        ("models.plain.lable", "models.plain.lable: there is no 'lable' to remove: did you mean 'label'?"),
        ("evaluations.mian", "there is no 'mian' to remove: did you mean 'main'?"),
        ("evaluations.main.audit.twni", "there is no 'twni' to remove: did you mean 'twin'?"),
        ("attacks.lavan.attack.stesp", "there is no 'stesp' to remove: did you mean 'steps'?"),
        ("budgte", "there is no 'budgte' to remove: did you mean 'budget'?"),
        ("analyses.pixel", "there is no 'pixel' to remove: there is none to choose from"),
        ("models.plain.set.train", "there is no 'train' to remove"),
        ("models.fixed.each.0", "each is a single value or a list, it has no keys"),
    ],
)
def test_a_key_that_cannot_be_there_is_a_mistake(tmp_path: Path, key: str, message: str) -> None:
    assert message in mistakes(write_study_file(tmp_path), f"{key}=null")


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
def test_a_key_that_may_be_there_can_be_removed(tmp_path: Path, key: str) -> None:
    assert load_study(write_study_file(tmp_path), [f"{key}=null"])


def test_keys_of_a_base_and_of_a_scale_can_be_removed(tmp_path: Path) -> None:
    write_study_file(tmp_path)
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


def test_null_in_set_is_a_value_of_a_recipe_key(tmp_path: Path) -> None:
    study = STUDY.replace("models: {{ptq: null}}", "models: {{plain: {{set: {{train.attack: null}}}}}}")
    file = write_study_file(tmp_path, study=study)
    assert load_study(file, scale="smoke").models["plain"].set == {"train.attack": None}
