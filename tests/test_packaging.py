"""What pyproject.toml promises: lower bounds that are tested, extras without gaps, and a wheel with all its files."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
# Their lower bounds are the releases that the other tests run with.
NOT_LOWERED = {"export", "ray"}


def lower_bounds(requirements: list[str]) -> dict[str, str]:
    found = (re.match(r"([\w.-]+)(?:\[.*\])?>=([\w.]+)", line) for line in requirements)
    return {match[1]: match[2] for match in found if match}


def test_the_lowest_versions_that_are_tested_are_the_lower_bounds() -> None:
    extras = PROJECT["optional-dependencies"]
    bounds = lower_bounds(PROJECT["dependencies"])
    for name in extras.keys() - NOT_LOWERED:
        bounds |= lower_bounds([line for line in extras[name] if not line.startswith(PROJECT["name"])])
    lines = (REPOSITORY / "requirements" / "lowest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    assert pinned == bounds


def test_every_requirement_has_a_lower_bound() -> None:
    lines = [*PROJECT["dependencies"], *(line for name in ("export", "ray", "train") for line in lines_of(name))]
    assert len(lower_bounds(lines)) == len(lines)


def lines_of(extra: str) -> list[str]:
    return PROJECT["optional-dependencies"][extra]


@pytest.mark.parametrize("name", ["all", "reproduce"])
def test_extras_of_extras_exist(name: str) -> None:
    (line,) = lines_of(name)
    match = re.fullmatch(rf"{PROJECT['name']}\[([\w,]+)\]", line)
    assert match is not None
    assert set(match[1].split(",")) <= PROJECT["optional-dependencies"].keys()


@pytest.mark.parametrize("folder", ["recipes", "docs", "examples", "qadtr_brevitas"])
def test_extras_that_texts_name_exist(folder: str) -> None:
    files = [path for path in (REPOSITORY / folder).rglob("*") if path.suffix in {".yaml", ".md", ".py"}]
    named = {
        (extra, str(path.relative_to(REPOSITORY)))
        for path in files
        for names in re.findall(rf"{PROJECT['name']}\[([\w,]+)\]", path.read_text(encoding="utf-8"))
        for extra in names.split(",")
    }
    assert [found for found in sorted(named) if found[0] not in PROJECT["optional-dependencies"]] == []


def test_the_citation_has_the_version_and_the_paper() -> None:
    import qadtr_brevitas

    text = (REPOSITORY / "CITATION.cff").read_text()
    assert f"\nversion: {qadtr_brevitas.__version__}\n" in text
    assert "Breaking the Limits of Quantization-Aware Defenses" in text


@pytest.mark.slow
def test_the_wheel_has_the_type_marker_recipes_and_templates(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(REPOSITORY)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(ZipFile(wheel).namelist())
    packaged = {
        f"qadtr_brevitas/{path.relative_to(REPOSITORY / 'qadtr_brevitas')}"
        for path in (REPOSITORY / "qadtr_brevitas").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "qadtr_brevitas/py.typed" in names
    assert packaged <= names
    assert {f"qadtr_brevitas/{path.relative_to(REPOSITORY)}" for path in REPOSITORY.glob("recipes/**/*.yaml")} <= names
    assert not [name for name in names if name.startswith(("tests/", "examples/", "benchmarks/"))]
