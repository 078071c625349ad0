"""Reading studies: scales and changes from the command line, and every mistake with its place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.reproduce.study.file import dump_json, find_study, load_study
from tests.reproduce.study.support import CERTIFYING, STUDY, mistakes, plan_study, write_study_file


def test_a_scale_changes_the_rest_of_the_file(tmp_path: Path) -> None:
    file = write_study_file(tmp_path)
    assert set(load_study(file).models) == {"plain", "fixed", "ptq"}
    assert set(load_study(file, scale="smoke").models) == {"plain", "fixed"}
    with pytest.raises(UsageError, match=r"'smal'.*'small'"):
        load_study(file, scale="smal")
    with pytest.raises(UsageError, match=r"'full'.*small, smoke"):
        load_study(file, scale="full")


def test_changes_from_the_command_line(tmp_path: Path) -> None:
    file = write_study_file(tmp_path)
    study = load_study(file, ["budget.images=all", "seeds=[3,4]", "models.plain.set={train.epochs: 1}"])
    assert (study.budget.images, study.seeds, study.models["plain"].set) == ("all", (3, 4), {"train.epochs": 1})
    assert "ptq" not in load_study(file, ["models.ptq=null"]).models
    assert "key=value" in mistakes(file, "budget")
    assert "precisions is a single value or a list" in mistakes(file, "precisions.0=3")
    assert "'[1' is not YAML" in mistakes(file, "seeds=[1")


def test_a_study_as_it_was_run_reads_back_equal(tmp_path: Path) -> None:
    study = load_study(write_study_file(tmp_path))
    (tmp_path / "again.yaml").write_text(f"# As it was run.\n{dump_json(study)}")
    assert load_study(tmp_path / "again.yaml") == study


def test_every_mistake_has_its_line_and_the_nearest_key(tmp_path: Path) -> None:
    text = STUDY.replace("title: A tiny study", "titel: A tiny study").replace("label: Plain", "lable: Plain")
    found = mistakes(write_study_file(tmp_path, study=text))
    assert re.search("tiny_study.yaml:2: titel: .*'title'", found)
    assert re.search("tiny_study.yaml:6: models.plain.lable: .*'label'", found)


def test_an_unknown_study_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match=r"'table99'.*did you mean 'table"):
        find_study("table99")


def test_certificates_that_cannot_be_made_are_refused_when_the_study_is_read(tmp_path: Path) -> None:
    file = write_study_file(tmp_path, study=CERTIFYING)
    key = "evaluations.certified.certify"
    assert "3x10" in mistakes(file, f"{key}.sizes=[5y]")
    assert "prime number" in mistakes(file, f"{key}.method=one round", f"{key}.masks=6")
    assert "each patch size once" in mistakes(file, f"{key}.sizes=[2,2x2]")
    assert "'masks'" in mistakes(file, f"{key}.mask=3")
    with pytest.raises(UsageError, match=r"plain at random\(32\+4\) .* evaluations.certified.certify"):
        plan_study(file, "models.plain.precisions=[4,random(32+4)]")
