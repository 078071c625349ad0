"""`key.sub=value` from the command line, put into a recipe's tree; the checks that follow are those of the file."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from qadtr_brevitas.config.problems import fields_of, section_in
from qadtr_brevitas.config.renamed import renamed_key
from qadtr_brevitas.config.sections import Recipe
from qadtr_brevitas.config.slots import Slot, slot_in
from qadtr_brevitas.config.source import Node, YamlError, parse
from qadtr_brevitas.core.errors import Problem, suggest


class _Refused(Exception):
    """An override that cannot be put into the tree."""


def apply_override(root: Node, text: str) -> Problem | None:
    """Puts `key.sub=value` into the tree in place; a value of null takes the key, or the list item, out.

    Returns:
        What is wrong with it, or None.
    """
    path, equals, value = text.partition("=")
    path = path.strip()
    if not equals or not path:
        return Problem(text, "is no override: write key=value, for instance train.epochs=3")
    try:
        _put(root, path.split("."), parse(value, line=None))
    except YamlError as error:
        return Problem(path, f"the value {value!r} is not YAML: {error.reason}")
    except _Refused as error:
        return Problem(path, str(error))
    return None


def _put(root: Node, parts: list[str], value: Node) -> None:
    owner: Any = Recipe
    annotation: Any = Recipe
    slot: Slot | None = None
    node = root
    for index, part in enumerate(parts):
        fields = fields_of(owner)
        if new := renamed_key(part, fields):
            raise _Refused(f"is called {'.'.join((*parts[:index], new, *parts[index + 1 :]))}")
        if fields and part not in fields:
            raise _Refused(f"unknown key: {_suggest_path('.'.join(parts), owner)}")
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
            # A plug-in that is there by default can be changed without being named.
            children[key] = Node(None, scalar=default if slot and isinstance(default, str) else None)
        node = children[key]
    return None


def _open(node: Node, slot: Slot | None, parts: list[str]) -> None:
    """Makes a node that is about to get members a mapping; a plug-in given by its bare name becomes {name: ...}."""
    if node.children is not None:
        return
    if node.scalar is not None and slot is None:
        raise _Refused(f"{'.'.join(parts)} is a single value, it has no keys")
    node.children = {} if node.scalar is None else {slot.key if slot else "": Node(node.line, scalar=node.scalar)}
    node.scalar = None


def _index(node: Node, part: str, parts: list[str]) -> int:
    count = len(node.children or {})
    if not part.isdigit() or int(part) > count:
        raise _Refused(f"{'.'.join(parts)} is a list of {count}: use an index from 0, or {count} for one more")
    return int(part)


def _set(node: Node, key: int | str, value: Node) -> None:
    assert node.children is not None
    if value.children is not None or value.scalar is not None:
        node.children[key] = value
        return
    node.children.pop(key, None)
    if node.is_list:
        node.children = dict(enumerate(node.children.values()))


def _suggest_path(path: str, owner: Any) -> str:
    """The nearest right path: the same last key elsewhere, else one that is spelled much like it."""
    known = list(_paths(Recipe))
    same = [right for right in known if right.rpartition(".")[2] == path.rpartition(".")[2]]
    near = same or get_close_matches(path, known, n=1)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else suggest(path, fields_of(owner))


def _paths(owner: Any, prefix: str = "") -> Iterator[str]:
    for name, field in fields_of(owner).items():
        yield prefix + name
        yield from _paths(section_in(field.annotation), f"{prefix}{name}.")
