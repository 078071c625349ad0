"""Every recipe that ships is valid, says what it is and how to run it, and is in the wheel."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qadtr_brevitas.config import load_recipe
from qadtr_brevitas.config.shipped import recipe_description, shipped_defenses, shipped_recipes, shipped_studies

SHIPPED = list(shipped_recipes().values())
DEFENSES = list(shipped_defenses().values())
BACKBONES = ["digits_qat", "cifar10_resnet20_qat", "cifar10_vit_qat", "imagenet_resnet34_qat"]


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


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_defense_can_be_added_to_every_kind_of_network(backbone: str) -> None:
    plain = load_recipe(backbone)
    for defense in DEFENSES:
        defended = load_recipe(f"{backbone}+{defense.stem}")
        # Two of them draw bit-widths evenly as they are.
        assert defended != plain or defense.stem == "uniform"
        # The same budget for every defense.
        assert (defended.model, defended.data) == (plain.model, plain.data)
        assert (defended.train.epochs, defended.train.optimizer) == (plain.train.epochs, plain.train.optimizer)


@pytest.mark.parametrize("defense", DEFENSES, ids=lambda path: path.stem)
def test_a_defense_says_what_it_is_and_how_it_is_added(defense: Path) -> None:
    assert 10 < len(recipe_description(defense)) < 115
    assert f"qadtr-brevitas train cifar10_resnet20_qat+{defense.stem}\n" in defense.read_text(encoding="utf-8")


def test_an_ablation_lacks_one_part() -> None:
    full = load_recipe("cifar10_resnet20_qat+qadtr").model_dump(mode="json")["train"]

    def differing(defense: str) -> set[str]:
        other = load_recipe(f"cifar10_resnet20_qat+{defense}").model_dump(mode="json")["train"]
        return {key for key in full if full[key] != other[key]}

    assert differing("qadtr_no_aqapa") == differing("qadtr_pbat_patches") == {"attack"}
    assert differing("qadtr_no_dbwt") == {"precision"}
    assert differing("qadtr_no_gir") == {"gradient"}


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
    assert {f"qadtr_brevitas/recipes/defenses/{path.name}" for path in DEFENSES} <= names
    assert {f"qadtr_brevitas/recipes/studies/{path.name}" for path in shipped_studies().values()} <= names
    assert {"qadtr_brevitas/__main__.py", "qadtr_brevitas/cli/main.py"} <= names
    assert not [name for name in names if name.startswith(("tests", "recipes", "bench"))]
