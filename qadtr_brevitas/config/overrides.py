"""`key.sub=value` from the command line, put into the tree of a recipe before the tree is checked."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from qadtr_brevitas.config.problems import fields_of, section_in
from qadtr_brevitas.config.recipe import Recipe
from qadtr_brevitas.config.renamed import moved_key, renamed_key
from qadtr_brevitas.config.slots import Slot, slot_in
from qadtr_brevitas.config.source import YamlError, YamlNode, parse_value
from qadtr_brevitas.core.errors import Problem, suggest


class _OverrideError(Exception):
    """An override that does not fit the tree."""


def apply_override(root: YamlNode, text: str) -> Problem | None:
    """Put `key.sub=value` into the tree, in place; a value of null deletes the key or the list item.

    Returns:
        The problem with the override, or None.
    """
    path, equals, value = text.partition("=")
    path = path.strip()
    if not equals or not path:
        return Problem(text, "is not an override: write key=value, for instance train.epochs=3")
    try:
        _put(root, path.split("."), parse_value(value))
    except YamlError as error:
        return Problem(path, f"the value {value!r} is not YAML: {error.reason}")
    except _OverrideError as error:
        return Problem(path, str(error))
    return None


def _put(root: YamlNode, parts: list[str], value: YamlNode) -> None:
    owner: Any = Recipe
    annotation: Any = Recipe
    slot: Slot | None = None
    node = root
    for index, part in enumerate(parts):
        fields = fields_of(owner)
        if new := renamed_key(part, fields) or moved_key(part, fields):
            raise _OverrideError(f"is called {'.'.join((*parts[:index], new, *parts[index + 1 :]))}")
        if fields and part not in fields:
            raise _OverrideError(f"unknown key: {_suggest_path('.'.join(parts), owner)}")
        _open(node, slot, parts[:index])
        children = node.children
        assert children is not None
        key: int | str = _index(node, part, parts[:index]) if node.is_list else part
        if fields:
            annotation = fields[part].annotation
            slot, owner = slot_in(annotation, fields[part].metadata), section_in(annotation)
            default = fields[part].default
        else:
            default = None
            slot = slot if node.is_list else None
            owner = None
        if index == len(parts) - 1:
            return _set(node, key, value)
        if key not in children:
            # The keys of a default plug-in can be changed without naming it.
            children[key] = YamlNode(None, scalar=default if slot and isinstance(default, str) else None)
        node = children[key]
    return None


def _open(node: YamlNode, slot: Slot | None, parts: list[str]) -> None:
    """Turn a node that is about to get members into a mapping; a plug-in given by its name becomes {name: ...}."""
    if node.children is not None:
        return
    if node.scalar is not None and slot is None:
        raise _OverrideError(f"{'.'.join(parts)} is a single value and has no keys")
    node.children = {} if node.scalar is None else {slot.key if slot else "": YamlNode(node.line, scalar=node.scalar)}
    node.scalar = None


def _index(node: YamlNode, part: str, parts: list[str]) -> int:
    count = len(node.children or {})
    if not part.isdigit() or int(part) > count:
        raise _OverrideError(f"{'.'.join(parts)} has {count} items: use an index from 0, or {count} to append one")
    return int(part)


def _set(node: YamlNode, key: int | str, value: YamlNode) -> None:
    assert node.children is not None
    if value.children is not None or value.scalar is not None:
        node.children[key] = value
        return
    node.children.pop(key, None)
    if node.is_list:
        node.children = dict(enumerate(node.children.values()))


def _suggest_path(path: str, owner: Any) -> str:
    """Return advice for an unknown path: paths with the same last key, else the one spelled most like it."""
    known = list(_paths(Recipe))
    same = [other for other in known if other.rpartition(".")[2] == path.rpartition(".")[2]]
    near = same or get_close_matches(path, known, n=1)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else suggest(path, fields_of(owner))


def _paths(owner: Any, prefix: str = "") -> Iterator[str]:
    for name, field in fields_of(owner).items():
        yield prefix + name
        yield from _paths(section_in(field.annotation), f"{prefix}{name}.")
