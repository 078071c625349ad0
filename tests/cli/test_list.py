from __future__ import annotations

import json

import pytest

from qadtr_brevitas.cli.list import KINDS
from qadtr_brevitas.cli.main import main


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "models"])
def test_every_kind_has_described_names(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", kind, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows
    assert all(row["name"] and row["description"] for row in rows)
    assert main(["list", kind]) == 0
    text = capsys.readouterr().out
    assert all(row["name"] in text for row in rows)


@pytest.mark.parametrize(
    ("name", "library"), [("cifar_resnet20", "timm"), ("resnet20", None), ("alexnet", "torchvision")]
)
def test_models_are_those_of_timm_and_torchvision(
    name: str, library: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list", "models", name, "--json"]) == 0
    wanted = [] if library is None else [{"name": name, "description": library}]
    assert json.loads(capsys.readouterr().out) == wanted


def test_a_pattern_that_fits_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "attacks", "zzz*", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_an_unknown_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "atacks"]) == 2
    assert "cannot list 'atacks': did you mean 'attacks'?" in capsys.readouterr().err
