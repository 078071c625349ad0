"""Imports point down only, and what the command line needs for help and recipes loads nothing heavy."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import qadtr_brevitas

PACKAGE = Path(qadtr_brevitas.__file__).parent
# A folder imports from folders to its left only.
FOLDERS = (
    *("core", "data", "models", "quant", "attacks", "config", "pipeline", "evaluation"),
    *("training", "auditing", "exporting", "viewing", "reproduce", "api", "testing", "cli"),
)
HEAVY = {"accelerate", "brevitas", "matplotlib", "pyautoattack", "scipy", "timm", "torch", "torchattack", "torchvision"}
# What checks recipes; lists, help and completion need neither.
CHECKERS = {"pydantic", "ruamel"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def folder_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0]


def imported(node: ast.AST) -> Iterator[str]:
    """Full names of the modules an import statement names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        if node.module == "qadtr_brevitas":
            yield from (f"qadtr_brevitas.{alias.name}" for alias in node.names)
        yield node.module or ""


def without_type_imports(tree: ast.Module) -> ast.Module:
    """The statements of a module without its `if TYPE_CHECKING:` blocks."""
    kept = [node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    return ast.Module(kept, tree.type_ignores)


def folders_imported(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    if file == PACKAGE / "config" / "sections.py":
        # For type checkers, the slots of a recipe name the contracts of their plug-ins.
        tree = without_type_imports(tree)
    names = {name for node in ast.walk(tree) for name in imported(node)}
    return {name.split(".")[1] for name in names if name.startswith("qadtr_brevitas.")} & set(FOLDERS)


def test_every_module_lies_in_a_folder() -> None:
    loose = {path.name for path in PACKAGE.glob("*.py")}
    assert loose == {"__init__.py", "__main__.py"}
    assert {folder_of(file) for file in modules()} - loose == set(FOLDERS)


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_folder_imports_from_folders_to_its_left_only(file: Path) -> None:
    if (folder := folder_of(file)) in FOLDERS:
        left = FOLDERS[: FOLDERS.index(folder)]
        assert folders_imported(file) - {folder} <= set(left), f"{folder} may import from {left} only"


def test_quant_and_attacks_do_not_know_each_other() -> None:
    assert not [file for file in modules() if folder_of(file) == "attacks" and "quant" in folders_imported(file)]


@pytest.mark.slow
def test_modules_do_not_import_in_a_circle() -> None:
    names = {file: ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in modules()}
    known = set(names.values())
    graph = {
        name: {other for node in ast.walk(ast.parse(file.read_text())) for other in imported(node)} & known - {name}
        for file, name in names.items()
    }
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("folder", ["core", "config", "cli"])
def test_what_lists_and_help_need_imports_nothing_heavy_at_the_top(folder: str) -> None:
    for file in sorted((PACKAGE / folder).rglob("*.py")):
        statements = ast.parse(file.read_text()).body
        names = {name.split(".")[0] for statement in statements for name in imported(statement)}
        assert not names & HEAVY, file.name


def loaded_by(code: str, **variables: str) -> set[str]:
    """Return the top-level modules that are loaded after running code in a fresh interpreter."""
    script = f"{code}\nimport sys\nprint('|', *{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
        env={**os.environ, **variables},
    )
    return set(result.stdout.rpartition("|")[2].split())


def loaded_by_command(command: str, **variables: str) -> set[str]:
    code = (
        "from qadtr_brevitas.cli.main import main\n"
        f"try: main({command.split()!r})\n"
        "except SystemExit as stop: assert not stop.code\n"
    )
    return loaded_by(code, **variables)


@pytest.mark.parametrize(
    "command", ["--help", "list attacks", "recipes list", "recipes show digits_qat", "train --help", "attack --help"]
)
def test_help_and_lists_load_nothing_heavy(command: str) -> None:
    assert not loaded_by_command(command) & (HEAVY | CHECKERS)


@pytest.mark.parametrize("command", ["attack", "evaluate", "convert", "export"])
def test_shell_completion_loads_nothing_heavy(command: str) -> None:
    words = f"qadtr-brevitas {command} --d"
    code = (
        "from qadtr_brevitas.cli.main import cli\n"
        "try: cli.main(prog_name='qadtr-brevitas')\n"
        "except SystemExit as stop: assert not stop.code\n"
    )
    loaded = loaded_by(code, _QADTR_BREVITAS_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD="2")
    assert "qadtr_brevitas" in loaded
    assert not loaded & (HEAVY | CHECKERS)


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded_by("import qadtr_brevitas") & (HEAVY | {"numpy", "pydantic"})
