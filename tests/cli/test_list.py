from __future__ import annotations

import json
from dataclasses import fields

import pytest

from qadtr_brevitas.attacks.pixel import Pgd
from qadtr_brevitas.cli.list import KINDS
from qadtr_brevitas.cli.main import main
from qadtr_brevitas.config.keys import plugin_keys
from qadtr_brevitas.core.registry import REGISTRIES, Registry


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "models"])
def test_every_kind_has_described_names(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", kind, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows
    assert all(row["name"] and row["description"] for row in rows)
    assert main(["list", kind]) == 0
    text = capsys.readouterr().out
    assert all(row["name"] in text for row in rows)


@pytest.mark.parametrize(("name", "library"), [("cifar_resnet20", "timm"), ("alexnet", "torchvision")])
def test_models_are_those_of_timm_and_torchvision(name: str, library: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "models", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"name": name, "description": library}]


def test_a_pattern_that_fits_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "attacks", "lavam"]) == 2
    assert "'lavam': did you mean 'lavan'?" in capsys.readouterr().err


def test_keys_of_a_plug_in_have_their_limits_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "attacks", "p*d", "--keys", "--json"]) == 0
    keys = {key["name"]: key for key in json.loads(capsys.readouterr().out)["pgd"]}
    assert set(keys) == {field.name for field in fields(Pgd)}
    assert (keys["eps"]["values"], keys["eps"]["default"]) == ("number >= 0 and <= 1", "0.03")
    assert main(["list", "schedules", "uniform", "--keys"]) == 0
    assert "[32, 8, 5, 4, 2]" in capsys.readouterr().out


@pytest.mark.parametrize("registry", REGISTRIES.values(), ids=list(REGISTRIES))
def test_every_key_is_described(registry: Registry) -> None:
    for name, plugin in registry.load_all().items():
        if isinstance(plugin, type):
            assert all(key.values and key.description for key in plugin_keys(plugin)), name


@pytest.mark.parametrize("kind", ["targets", "models", "recipes"])
def test_what_has_no_keys(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", kind, "--keys"]) == 2
    assert f"{kind} have no keys" in capsys.readouterr().err


def test_an_unknown_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "atacks"]) == 2
    assert "cannot list 'atacks': did you mean 'attacks'?" in capsys.readouterr().err
