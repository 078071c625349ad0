"""Recipes made of others: `base:` in a file, or `RECIPE+DEFENSE` where a recipe is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from qadtr_brevitas.config.shipped import find_defense, find_recipe, split_name
from qadtr_brevitas.config.source import Node, read_source
from qadtr_brevitas.core.errors import Problem, RecipeError, UsageError

BASE = "base"
# The keys that say which plug-in a mapping is for.
_NAMES = ("name", "schedule")


Find: TypeAlias = Callable[[str | Path], Path]
"""Finds a file by path or name."""


def read_layers(source: str | Path, *, find: Find = find_recipe) -> Node:
    """Reads a recipe with everything it is made of, each layer changing the keys of those before it.

    A key that is null in a later layer is taken out; a mapping that names another plug-in replaces the earlier one.

    Args:
        source: a file, the name of a shipped recipe, or several names as `RECIPE+DEFENSE`.
        find: finds it, and bases.

    Returns:
        The tree; lines are those of the file, or of its key `base`, and None where several names are given.

    Raises:
        UsageError: there is no such recipe or defense, or a file is no mapping.
        RecipeError: a file is not YAML, or is its own base.
    """
    return without_removed(_LayerReader(find).read(source))


def without_removed(node: Node) -> Node:
    """A tree without the keys that an upper layer takes out."""
    if node.children is None or node.is_list:
        return node
    kept = {key: without_removed(child) for key, child in node.children.items() if not child.removes}
    return replace(node, children=kept)


def merge(lower: Node, upper: Node) -> Node:
    """A tree with the keys of the upper one changed in the lower one; both stay as they are.

    A null over a key that is there stays in the tree, marked: there may be one more layer below.
    """
    if not (_is_mapping(lower) and _is_mapping(upper)) or _names_another(lower, upper):
        return upper
    assert lower.children is not None
    assert upper.children is not None
    children = dict(lower.children)
    for key, node in upper.children.items():
        if key in children:
            removes = node.children is None and node.scalar is None
            node = replace(node, removes=True) if removes else merge(children[key], node)
        children[key] = node
    return Node(upper.line, children=children)


@dataclass(frozen=True)
class _LayerReader:
    """Reads a file and its bases; `seen` are the files that led here, `folder` is that of the last one."""

    find: Find
    folder: Path | None = None
    seen: tuple[Path, ...] = ()

    def read(self, source: str | Path) -> Node:
        """The tree with its layers, and what they take out still in it."""
        first, *defenses = split_name(source)
        node = self._read_file(self._place(first))
        for name in defenses:
            node = merge(_at_line(node, None), _at_line(self._read_file(find_defense(name)), None))
        return node

    def _place(self, name: str | Path) -> Path:
        # A base is looked for beside the file that names it first.
        near = [] if self.folder is None else [self.folder / name, self.folder / f"{name}.yaml"]
        return next((path for path in near if path.is_file()), None) or self.find(name)

    def _read_file(self, path: Path) -> Node:
        node = read_source(path)
        assert node.children is not None
        base = node.children.pop(BASE, None)
        if base is None:
            return node
        return merge(_at_line(self._read_base(path, base), base.line), node)

    def _read_base(self, path: Path, base: Node) -> Node:
        def problem(text: str) -> RecipeError:
            return RecipeError(str(path), [Problem(BASE, text, base.line)])

        if not isinstance(base.scalar, str):
            raise problem("must name a recipe")
        place = path.resolve()
        if place in self.seen:
            raise problem(f"{base.scalar} leads back here: remove one of the two")
        try:
            return _LayerReader(self.find, path.parent, (*self.seen, place)).read(base.scalar)
        except RecipeError:
            raise
        except UsageError as error:
            raise problem(str(error)) from error


def _at_line(node: Node, line: int | None) -> Node:
    """The tree with one line for all: where the reader finds what brought it in."""
    if node.children is None:
        return replace(node, line=line)
    return replace(node, line=line, children={key: _at_line(child, line) for key, child in node.children.items()})


def _is_mapping(node: Node) -> bool:
    return node.children is not None and not node.is_list


def _names_another(lower: Node, upper: Node) -> bool:
    assert lower.children is not None
    assert upper.children is not None
    shared = [key for key in _NAMES if key in lower.children and key in upper.children]
    return any(lower.children[key].scalar != upper.children[key].scalar for key in shared)
