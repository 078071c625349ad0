"""Recipes made of others: `base:` in a file, or `RECIPE+DEFENSE` where a recipe is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qadtr_brevitas.errors import Problem, RecipeError, UsageError
from qadtr_brevitas.recipe.source import Node, read_source
from qadtr_brevitas.recipe_files import find_defense, find_recipe, split_name

BASE = "base"
# The keys that say which plug-in a mapping is for.
_NAMES = ("name", "schedule")


def read_layers(source: str | Path) -> Node:
    """Reads a recipe with everything it is made of, each layer changing the keys of those before it.

    A key that is null in a later layer is taken out; a mapping that names another plug-in replaces the earlier one.

    Args:
        source: a file, the name of a shipped recipe, or several names as `RECIPE+DEFENSE`.

    Returns:
        The tree; lines are those of the file, or of its key `base`, and None where several names are given.

    Raises:
        UsageError: there is no such recipe or defense, or a file is no mapping.
        RecipeError: a file is not YAML, or is its own base.
    """
    node = _read(source, folder=None, seen=())
    # A recipe of a single layer keeps them: there a null is a value, right or wrong.
    is_layered = len(split_name(source)) > 1 or BASE in (read_source(find_recipe(source)).children or {})
    return without_nulls(node) if is_layered else node


def without_nulls(node: Node) -> Node:
    """A tree without the keys that are null."""
    if node.children is None or node.is_list:
        return node
    kept = {key: without_nulls(child) for key, child in node.children.items() if not _is_null(child)}
    return replace(node, children=kept)


def merge(lower: Node, upper: Node) -> Node:
    """A tree with the keys of the upper one changed in the lower one, nulls included; both stay as they are."""
    if not (_is_mapping(lower) and _is_mapping(upper)) or _names_another(lower, upper):
        return upper
    assert lower.children is not None
    assert upper.children is not None
    children = dict(lower.children)
    for key, node in upper.children.items():
        children[key] = merge(children[key], node) if key in children else node
    return Node(upper.line, children=children)


def _read(source: str | Path, *, folder: Path | None, seen: tuple[Path, ...]) -> Node:
    first, *defenses = split_name(source)
    # A base is looked for beside the recipe that names it first.
    near = [] if folder is None else [folder / first, folder / f"{first}.yaml"]
    node = _read_file(next((path for path in near if path.is_file()), None) or find_recipe(first), seen)
    for name in defenses:
        node = merge(_at_line(node, None), _at_line(_read_file(find_defense(name), seen), None))
    return node


def _read_file(path: Path, seen: tuple[Path, ...]) -> Node:
    node = read_source(path)
    assert node.children is not None
    base = node.children.pop(BASE, None)
    if base is None:
        return node
    if not isinstance(base.scalar, str):
        raise RecipeError(str(path), [Problem(BASE, "must name a recipe", base.line)])
    place = path.resolve()
    if place in seen:
        raise RecipeError(
            str(path), [Problem(BASE, f"{base.scalar} leads back here: remove one of the two", base.line)]
        )
    try:
        found = _read(base.scalar, folder=path.parent, seen=(*seen, place))
    except RecipeError:
        raise
    except UsageError as error:
        raise RecipeError(str(path), [Problem(BASE, str(error), base.line)]) from error
    return merge(_at_line(found, base.line), node)


def _at_line(node: Node, line: int | None) -> Node:
    """The tree with one line for all: where the reader finds what brought it in."""
    if node.children is None:
        return replace(node, line=line)
    return replace(node, line=line, children={key: _at_line(child, line) for key, child in node.children.items()})


def _is_null(node: Node) -> bool:
    return node.children is None and node.scalar is None


def _is_mapping(node: Node) -> bool:
    return node.children is not None and not node.is_list


def _names_another(lower: Node, upper: Node) -> bool:
    assert lower.children is not None
    assert upper.children is not None
    shared = [key for key in _NAMES if key in lower.children and key in upper.children]
    return any(lower.children[key].scalar != upper.children[key].scalar for key in shared)
