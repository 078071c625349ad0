"""Taking keys out of a study: `models.ptq=null` on the command line."""

from __future__ import annotations

from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from qadtr_brevitas.errors import Problem, QadtrError, suggest
from qadtr_brevitas.recipe.problems import fields_of, section_in
from qadtr_brevitas.recipe.slots import Slot, slot_in
from qadtr_brevitas.recipe.source import Node
from qadtr_brevitas.study.sections import Study

NO_KEYS = "{} is a single value or a list, it has no keys"


def take_out(root: Node, path: str) -> Problem | None:
    """Takes a key out of the tree of a study, in place.

    Keys that a section may have and does not have are out already; any other is a mistake.

    Args:
        root: the tree.
        path: dotted path of the key.
    """
    node: Node | None = root
    owner: Any = Study
    *parents, last = path.split(".")
    for part in parents:
        if problem := _unknown(node, owner, path, part):
            return problem
        field, node = fields_of(owner).get(part), _children(node).get(part)
        if node is not None and (node.children is None or node.is_list):
            return Problem(path, NO_KEYS.format(part))
        owner = get_args(owner)[1] if get_origin(owner) is dict else _below(field, node)
    if problem := _unknown(node, owner, path, last):
        return problem
    if node is not None and node.children is not None:
        node.children.pop(last, None)
    return None


def _unknown(node: Node | None, owner: Any, path: str, key: str) -> Problem | None:
    """What to say of a key that is not there and could not be."""
    known = {*map(str, _children(node)), *fields_of(owner)}
    return None if key in known else Problem(path, f"there is no {key!r} to take out: {suggest(key, known)}")


def _children(node: Node | None) -> dict[int | str, Node]:
    return (node.children if node else None) or {}


def _below(field: FieldInfo | None, node: Node | None) -> Any:
    """What says which keys a value may have: a section, a mapping of sections, a plug-in; None where nothing does."""
    if field is None:
        return None
    if slot := slot_in(field.annotation, field.metadata):
        return _plugin(slot, node)
    return field.annotation if get_origin(field.annotation) is dict else section_in(field.annotation)


def _plugin(slot: Slot, node: Node | None) -> Any:
    name = _children(node).get(slot.key)
    try:
        return slot.registry.load(str(name.scalar)) if name else None
    except (QadtrError, ImportError, AttributeError):
        # Told when the study is checked.
        return None
