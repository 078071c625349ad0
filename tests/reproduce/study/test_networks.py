"""The networks of a study: their names, their keys, and recipes that are missing or wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from qadtr_brevitas.core.errors import CheckpointError, UsageError
from qadtr_brevitas.reproduce.study.file import load_study
from qadtr_brevitas.reproduce.study.networks import make_networks
from tests.reproduce.study.support import write_study_file


def test_the_key_of_a_network_depends_on_what_makes_it_only(tmp_path: Path) -> None:
    file = write_study_file(tmp_path)
    networks = make_networks(load_study(file)).by_name
    assert list(networks) == ["plain", "fixed-4", "ptq"]
    assert len({network.key for network in networks.values()}) == 3
    renamed = make_networks(load_study(file, ["models.other={}", "title=Another"])).by_name
    assert renamed["other"].key == networks["plain"].key
    # What a network starts from is a part of what makes it.
    longer = make_networks(load_study(file, ["models.plain.set={train.epochs: 3}"])).by_name
    assert longer["ptq"].key != networks["ptq"].key
    seeds = make_networks(load_study(file, ["seeds=[0,1]", "models.plain.seeds=[0]"])).by_name
    assert list(seeds) == ["plain", "fixed-4-s0", "fixed-4-s1", "ptq-s0", "ptq-s1"]
    assert seeds["fixed-4-s1"].start is seeds["plain"]
    assert seeds["fixed-4-s0"].key == networks["fixed-4"].key


def test_a_missing_or_wrong_recipe_is_reported_with_its_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"(?s)model plain .*nowhere.*recipe 'nowhere'"):
        make_networks(load_study(write_study_file(tmp_path), ["models.plain.recipe=nowhere"]))
    with pytest.raises(UsageError, match=r"(?s)model plain .*train.epochs: .*1.*0"):
        make_networks(load_study(write_study_file(tmp_path), ["models.plain.set={train.epochs: 0}"]))
    with pytest.raises(UsageError, match=r"(?s)model ptq .*defense 'pbatt'"):
        make_networks(load_study(write_study_file(tmp_path), ["models.ptq.defense=pbatt"]))


def test_a_finished_model_must_exist(tmp_path: Path) -> None:
    study = load_study(write_study_file(tmp_path), ["models={plain: {path: runs/gone}}"])
    with pytest.raises(CheckpointError, match="no model in runs/gone"):
        _ = make_networks(study).by_name["plain"].key
