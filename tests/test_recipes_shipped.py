"""Every recipe that ships is valid, says what it is and how to run it, and is in the wheel."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qadtr_brevitas.recipe import load_recipe
from qadtr_brevitas.recipe_files import recipe_description, shipped_recipes

SHIPPED = list(shipped_recipes().values())


@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda path: path.stem)
def test_it_is_valid_and_reads_back_equal(recipe: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe)
    copy = tmp_path / "recipe.yaml"
    copy.write_text(loaded.dump_yaml())
    assert load_recipe(copy) == loaded


@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda path: path.stem)
def test_its_header_describes_it_and_gives_the_command(recipe: Path) -> None:
    header: list[str] = []
    for line in recipe.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        header.append(line.lstrip("# "))
    assert 10 < len(recipe_description(recipe)) < 110
    command = re.compile(rf"qadtr-brevitas train {recipe.stem}( |$)")
    assert any(command.search(line) for line in header), "give the command"


def test_the_quickstart_has_its_recipes() -> None:
    assert {"digits_qat", "digits_qadtr"} <= set(shipped_recipes())


def test_all_are_in_the_wheel(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="needs the build backend")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=repository, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"qadtr_brevitas/recipes/{path.name}" for path in SHIPPED} <= names
    assert {"qadtr_brevitas/__main__.py", "qadtr_brevitas/cli/main.py"} <= names
    assert not [name for name in names if name.startswith(("tests", "recipes", "bench"))]
