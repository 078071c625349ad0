"""The reproduction of the paper is optional: the rest of the package never imports it, except its own commands."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import qadtr_brevitas

PACKAGE = Path(qadtr_brevitas.__file__).parent
REPRODUCE = "qadtr_brevitas.reproduce"
COMMANDS = {
    "cli/analyze.py",
    "cli/board.py",
    "cli/report.py",
    "cli/study.py",
    "cli/study_workers.py",
    "cli/study_cost.py",
}
CONTRACT_CHECK = "testing/analyses.py"


def imports_reproduce(node: ast.AST) -> bool:
    """Return whether a statement imports from the folder, outside of `if TYPE_CHECKING:` blocks."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return False
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").startswith(REPRODUCE)
    if isinstance(node, ast.Import):
        return any(alias.name.startswith(REPRODUCE) for alias in node.names)
    return any(imports_reproduce(child) for child in ast.iter_child_nodes(node))


def others() -> list[str]:
    """Return the modules outside the folder, without its contract check, relative to the package."""
    files = [file.relative_to(PACKAGE).as_posix() for file in sorted(PACKAGE.rglob("*.py"))]
    return [file for file in files if not file.startswith("reproduce/") and file != CONTRACT_CHECK]


@pytest.mark.slow
def test_only_its_commands_import_it() -> None:
    found = {file for file in others() if imports_reproduce(ast.parse((PACKAGE / file).read_text()))}
    assert found == COMMANDS


@pytest.mark.parametrize("file", sorted(COMMANDS))
def test_its_commands_import_it_inside_functions(file: str) -> None:
    statements = ast.parse((PACKAGE / file).read_text()).body
    assert not [node for node in statements if not isinstance(node, ast.FunctionDef) and imports_reproduce(node)]
