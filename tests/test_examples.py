"""Every script of examples/ runs, on a small budget."""

from __future__ import annotations

import copy
import os
import runpy
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from torch import nn

EXAMPLES = Path(__file__).parents[1] / "examples"
BUDGETS: dict[str, dict[str, Any]] = {
    "own_model": {"steps": 80},
    "own_data": {"steps": 40, "epochs": 1, "count": 400},
    "custom_attack": {"steps": 60, "images": 20},
    "ptq_methods": {"steps": 60, "samples": 32, "images": 20},
    "certify_and_deploy": {"steps": 60, "images": 6, "masks": 2},
    "finn_from_python": {"steps": 60, "images": 4},
    "ray_study": {
        "cpus": 1,
        "overrides": ["models.qadtr=null", "attacks={}", "evaluations.main.attacks=[]"],
    },
}

pytestmark = pytest.mark.slow


@cache
def trained(make: Callable[..., nn.Module], steps: int) -> nn.Module:
    """The network that most scripts begin with, trained once."""
    return make(steps=steps)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Return what runs a script as `python NAME.py` in an empty folder, but for its budget."""
    monkeypatch.syspath_prepend(EXAMPLES)
    start = import_module("digits_network")
    make = start.digits_network
    monkeypatch.setattr(start, "digits_network", lambda *, steps: copy.deepcopy(trained(make, steps)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda name: runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=name)["main"](**BUDGETS[name])


def test_every_script_has_a_test_and_a_line_in_the_list() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"digits_network", "__init__"}
    assert scripts == set(BUDGETS)
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"({name}.py)" in text for name in BUDGETS)


def test_a_network_of_ones_own_is_loaded_again(run: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = {bits: rate.value for bits, rate in run("own_model").clean_accuracy.items()}
    assert list(accuracy) == ["32", "8", "4", "2"]
    # A tenth is guessing.
    assert accuracy["32"] > 0.2
    assert accuracy["8"] == pytest.approx(accuracy["32"], abs=0.1)
    assert "features.0" in capsys.readouterr().out


def test_weights_are_tuned_on_a_folder(run: Callable[[str], Any]) -> None:
    accuracy = run("own_data").clean_accuracy
    assert list(accuracy) == ["32", "8", "5", "4", "2"]
    assert accuracy["32"].n > 10


def test_an_attack_of_ones_own_is_scored(run: Callable[[str], Any]) -> None:
    rates = run("custom_attack").asr["WorstColor size=12"]
    assert set(rates) == {"32", "8", "4"}


def test_calibrations_are_compared(run: Callable[[str], Any]) -> None:
    found = run("ptq_methods")
    assert {"minmax", "mse bias-correction", "percentile"} <= set(found)
    assert all(set(rates) == {"8", "4", "3", "2"} for rates in found.values())


def test_a_network_is_certified_and_exported(run: Callable[[str], Any], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    assert run("certify_and_deploy").certified_accuracy["8"].n == 6
    assert (tmp_path / "certify_and_deploy" / "model.onnx").is_file()


def test_a_folder_for_finn_is_written(run: Callable[[str], Any]) -> None:
    pytest.importorskip("qonnx")
    assert (run("finn_from_python") / "model.onnx").is_file()


@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="its node needs the cores for itself: make test-ray")
def test_a_study_runs_on_a_cluster(run: Callable[[str], Any], tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install 'qadtr-brevitas[ray]'")
    assert run("ray_study") == ["train qat", "evaluate qat"]
    assert (tmp_path / "ray_study" / "report" / "figures.csv").is_file()
