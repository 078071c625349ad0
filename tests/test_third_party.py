"""The package of examples/third_party_plugin, installed: its attack and its network are used like built-in ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "examples" / "third_party_plugin"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages that holds the example."""
    folder = tmp_path_factory.mktemp("site")
    command = [*(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")]
    subprocess.run([*command, "--target", str(folder), str(PACKAGE)], check=True)
    return folder


def run(site: Path, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), str(PACKAGE.parents[1])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def cli(site: Path, *arguments: str | Path, cwd: Path) -> str:
    result = run(site, "-m", "qadtr_brevitas", *arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_its_attack_is_listed_with_the_package_it_is_from(site: Path, tmp_path: Path) -> None:
    listed = json.loads(cli(site, "list", "attacks", "--json", cwd=tmp_path))
    assert "checkerboard-patch" in str([entry for entry in listed if "checkerboard" in str(entry)])
    assert "lavan" in str(listed)


@pytest.mark.slow
def test_its_own_tests_run_the_contract_check(site: Path, tmp_path: Path) -> None:
    result = run(site, "-m", "pytest", "-q", "-p", "no:cacheprovider", PACKAGE / "tests", cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    assert "3 passed" in result.stdout


@pytest.mark.slow
def test_its_network_is_attacked_by_its_attack(site: Path, tmp_path: Path) -> None:
    cli(site, "convert", "checkerboard_patch.models:tiny_net", "--calibrate", "digits", "-o", "tiny", cwd=tmp_path)
    cli(site, "attack", "tiny", "--attack", "checkerboard", "size=8", "cells=4", "--precision", "4", cwd=tmp_path)
    cli(site, "evaluate", "tiny", "--precision", "4", "--images", "50", cwd=tmp_path)
    report = json.loads((tmp_path / "tiny" / "evaluation" / "report.json").read_text())
    assert "checkerboard" in {patch["attack"] for patch in report["patches"]}
    assert {cell["precision"] for cell in report["cells"]} == {"4"}
