"""Imports point down only, and what the command line needs for help and recipes loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qadtr_brevitas
from qadtr_brevitas.registry import REGISTRIES

PACKAGE = Path(qadtr_brevitas.__file__).parent
LAYERS = (
    {"errors", "precision", "registry"},
    {"describe", "device", "files", "memory", "plugin", "protocol", "recipe", "recipe_files", "seeding"},
    {"attacks", "data", "models", "quant", "training"},
    {
        "build",
        "calibration",
        "certify",
        "checkpoint",
        "drawing",
        "fingerprints",
        "metrics",
        "paper",
        "predict",
        "report",
        "sources",
        "subjects",
        "weights",
        "widen",
    },
    {
        "analyze",
        "audit",
        "craft",
        "evaluate",
        "export",
        "gallery",
        "page",
        "plots",
        "study",
        "train",
        "unseen",
    },
    {"cli", "__main__"},
)
INDEPENDENT = LAYERS[2]
HEAVY = {"accelerate", "brevitas", "matplotlib", "pyautoattack", "scipy", "timm", "torch", "torchattack", "torchvision"}


def layer(part: str) -> int:
    found = [number for number, parts in enumerate(LAYERS) if part in parts]
    assert found, f"qadtr_brevitas/{part} is new: say in this file which layer it belongs to"
    return found[0]


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(node: ast.AST) -> Iterator[str]:
    """Full names of the modules an import statement names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        if node.module == "qadtr_brevitas":
            yield from (f"qadtr_brevitas.{alias.name}" for alias in node.names)
        yield node.module or ""


def parts_imported(file: Path) -> set[str]:
    names = {name for node in ast.walk(ast.parse(file.read_text())) for name in imported(node)}
    parts = {name.split(".")[1] for name in names if name.startswith("qadtr_brevitas.")}
    return parts - {"__version__"}


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    part = part_of(file)
    if part == "__init__":
        return
    for other in parts_imported(file) - {part}:
        assert layer(other) <= layer(part), f"{part} must not import {other}, which is above it"
        assert not {part, other} <= INDEPENDENT, f"{part} and {other} must not know each other"


def test_modules_of_one_layer_do_not_import_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for file in modules():
        graph.setdefault(part_of(file), set()).update(parts_imported(file) - {part_of(file)})
    done: set[str] = set()
    while len(done) < len(graph):
        ready = {part for part, needs in graph.items() if part not in done and needs <= done}
        assert ready, f"imported in a circle: {sorted(set(graph) - done)}"
        done |= ready


def light_files() -> list[Path]:
    light = LAYERS[0] | LAYERS[1] | LAYERS[5] | {"__init__"}
    targets = {target for registry in REGISTRIES.values() for target, _ in registry.builtin.values()}
    plugins = {PACKAGE.parent / f"{target.partition(':')[0].replace('.', '/')}.py" for target in targets}
    return sorted({file for file in modules() if part_of(file) in light} | plugins)


@pytest.mark.parametrize("file", light_files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_light_files_import_nothing_heavy_at_the_top(file: Path) -> None:
    statements = ast.parse(file.read_text()).body
    names = {name.split(".")[0] for statement in statements for name in imported(statement)}
    assert not names & HEAVY


def loaded_by(code: str) -> set[str]:
    """Top-level modules that are loaded after running code in a fresh interpreter."""
    script = f"{code}\nimport sys\nprint('|', *{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    return set(result.stdout.rpartition("|")[2].split())


def test_loading_every_plugin_loads_nothing_heavy() -> None:
    code = (
        "from qadtr_brevitas.registry import REGISTRIES\n"
        "for registry in REGISTRIES.values():\n"
        "    for name in registry.names(): registry.load(name)\n"
    )
    assert not loaded_by(code) & HEAVY


def test_checking_a_recipe_loads_nothing_heavy(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("train: {attack: a-qapa, gradient: gir}\n")
    code = f"from qadtr_brevitas.recipe import load_recipe\nload_recipe({str(file)!r}, ['seed=3']).dump_yaml()"
    loaded = loaded_by(code)
    assert "pydantic" in loaded
    assert not loaded & HEAVY
