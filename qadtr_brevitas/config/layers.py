"""Recipes made of others: `base:` in a file, or `RECIPE+DEFENSE` where a recipe is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from qadtr_brevitas.config.shipped import find_defense, find_recipe, split_name
from qadtr_brevitas.config.source import YamlNode, read_source
from qadtr_brevitas.core.errors import Problem, RecipeError, UsageError

BASE = "base"
# The keys that name the plug-in of a mapping.
_PLUGIN_KEYS = ("name", "schedule")


FindFile: TypeAlias = Callable[[str | Path], Path]
"""Returns the file of a path or name."""


def read_layers(source: str | Path, *, find: FindFile = find_recipe) -> YamlNode:
    """Read a recipe with its bases and defenses; each layer changes keys of those before it.

    A null in a later layer deletes the key; a mapping that names another plug-in replaces the earlier mapping.

    Args:
        source: a file, the name of a shipped recipe, or several names as `RECIPE+DEFENSE`.
        find: finds the file and its bases.

    Returns:
        The tree; lines are those of the file, or of its key `base`, and None where several names are given.

    Raises:
        UsageError: there is no such recipe or defense, or a file is not a mapping.
        RecipeError: a file is not YAML, or bases lead back to it.
    """
    return drop_deleted(_LayerReader(find).read(source))


def drop_deleted(node: YamlNode) -> YamlNode:
    """Return a tree without the keys that an upper layer deletes."""
    if node.children is None or node.is_list:
        return node
    kept = {key: drop_deleted(child) for key, child in node.children.items() if not child.deletes}
    return replace(node, children=kept)


def merge(lower: YamlNode, upper: YamlNode) -> YamlNode:
    """Return the lower tree with the keys of the upper one changed; both trees stay as they are.

    A null over an existing key stays in the tree, marked, because there may be one more layer below.
    """
    if not (_is_mapping(lower) and _is_mapping(upper)) or _names_other_plugin(lower, upper):
        return upper
    assert lower.children is not None
    assert upper.children is not None
    children = dict(lower.children)
    for key, node in upper.children.items():
        if key in children:
            deletes = node.children is None and node.scalar is None
            node = replace(node, deletes=True) if deletes else merge(children[key], node)
        children[key] = node
    return YamlNode(upper.line, children=children)


@dataclass(frozen=True)
class _LayerReader:
    """Reads a file and its bases; `seen` are the files that led to it, `folder` is that of the last one."""

    find: FindFile
    folder: Path | None = None
    seen: tuple[Path, ...] = ()

    def read(self, source: str | Path) -> YamlNode:
        """Return the merged tree, with the keys that layers delete still in it, marked."""
        first, *defenses = split_name(source)
        node = self._read_file(self._locate(first))
        for name in defenses:
            node = merge(_with_line(node, None), _with_line(self._read_file(find_defense(name)), None))
        return node

    def _locate(self, name: str | Path) -> Path:
        # The folder of the file that names a base is searched first.
        near = [] if self.folder is None else [self.folder / name, self.folder / f"{name}.yaml"]
        return next((path for path in near if path.is_file()), None) or self.find(name)

    def _read_file(self, path: Path) -> YamlNode:
        node = read_source(path)
        assert node.children is not None
        base = node.children.pop(BASE, None)
        if base is None:
            return node
        return merge(_with_line(self._read_base(path, base), base.line), node)

    def _read_base(self, path: Path, base: YamlNode) -> YamlNode:
        def problem(text: str) -> RecipeError:
            return RecipeError(str(path), [Problem(BASE, text, base.line)])

        if not isinstance(base.scalar, str):
            raise problem("must be the name or path of a recipe")
        place = path.resolve()
        if place in self.seen:
            raise problem(f"{base.scalar} leads back to this file: remove one of the two bases")
        try:
            return _LayerReader(self.find, path.parent, (*self.seen, place)).read(base.scalar)
        except RecipeError:
            raise
        except UsageError as error:
            raise problem(str(error)) from error


def _with_line(node: YamlNode, line: int | None) -> YamlNode:
    """Return the tree with one line for all keys: that of the key that included it."""
    if node.children is None:
        return replace(node, line=line)
    return replace(node, line=line, children={key: _with_line(child, line) for key, child in node.children.items()})


def _is_mapping(node: YamlNode) -> bool:
    return node.children is not None and not node.is_list


def _names_other_plugin(lower: YamlNode, upper: YamlNode) -> bool:
    assert lower.children is not None
    assert upper.children is not None
    shared = [key for key in _PLUGIN_KEYS if key in lower.children and key in upper.children]
    return any(lower.children[key].scalar != upper.children[key].scalar for key in shared)
