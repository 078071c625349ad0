"""Removing keys from a study: `models.ptq=null` on the command line, or null in a scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import get_args, get_origin

from pydantic.fields import FieldInfo

from qadtr_brevitas.config.problems import fields_of, section_in
from qadtr_brevitas.config.slots import Slot, slot_in
from qadtr_brevitas.config.source import YamlNode
from qadtr_brevitas.core.errors import Problem, QadtrError, suggest
from qadtr_brevitas.reproduce.study.sections import Study

RECIPE_CHANGES = "set"
"""The key whose mapping holds values of recipe keys: there, null is a value and removes nothing."""


def remove_key(root: YamlNode, path: str) -> Problem | None:
    """Remove a key from the tree of a study, in place.

    A key that its section may have but does not have needs no removal; any other missing key is a mistake.

    Args:
        root: the tree.
        path: dotted path of the key.

    Returns:
        The mistake, or None.
    """
    node: YamlNode | None = root
    owner: object = Study
    *parents, last = path.split(".")
    for part in parents:
        if problem := _unknown_key(node, owner, path, part):
            return problem
        field, node = fields_of(owner).get(part), _children(node).get(part)
        if node is not None and is_value(node):
            return no_keys(path, part)
        owner = get_args(owner)[1] if get_origin(owner) is dict else _owner_below(field, node)
    if problem := _unknown_key(node, owner, path, last):
        return problem
    if node is not None and node.children is not None:
        node.children.pop(last, None)
    return None


def mark_nulls(node: YamlNode) -> YamlNode:
    """Return the tree with its nulls marked as removals of what the study has there, except recipe changes."""
    if node.children is None or node.is_list:
        return replace(node, deletes=node.children is None and node.scalar is None)
    children = {
        key: child if key == RECIPE_CHANGES and child.children else mark_nulls(child)
        for key, child in node.children.items()
    }
    return replace(node, children=children)


def is_value(node: YamlNode) -> bool:
    """Return whether a node is a single value or a list, which has no keys."""
    return node.children is None or node.is_list


def no_keys(path: str, part: str) -> Problem:
    """Return the mistake of a path that goes through a single value or a list."""
    return Problem(path, f"{part} is a single value or a list, it has no keys")


def _unknown_key(node: YamlNode | None, owner: object, path: str, key: str) -> Problem | None:
    known = {*map(str, _children(node)), *fields_of(owner)}
    return None if key in known else Problem(path, f"there is no {key!r} to remove: {suggest(key, known)}")


def _children(node: YamlNode | None) -> Mapping[int | str, YamlNode]:
    return (node.children if node else None) or {}


def _owner_below(field: FieldInfo | None, node: YamlNode | None) -> object:
    """Return what defines the keys of a value: a section, a mapping of sections or a plug-in; None for anything."""
    if field is None:
        return None
    if slot := slot_in(field.annotation, field.metadata):
        return _plugin_class(slot, node)
    return field.annotation if get_origin(field.annotation) is dict else section_in(field.annotation)


def _plugin_class(slot: Slot, node: YamlNode | None) -> object:
    name = _children(node).get(slot.key)
    try:
        return slot.registry.load(str(name.scalar)) if name else None
    except QadtrError:
        # The check of the study reports it.
        return None
