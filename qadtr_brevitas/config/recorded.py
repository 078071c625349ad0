"""The recipe that a run directory records: written by this release or by one whose keys had other names."""

from __future__ import annotations

from pydantic.fields import FieldInfo

from qadtr_brevitas.config.problems import fields_of, section_in
from qadtr_brevitas.config.renamed import renamed_key
from qadtr_brevitas.config.sections import CalibrationSection, TransformSection
from qadtr_brevitas.config.slots import Slot, slot_in
from qadtr_brevitas.config.source import YamlNode
from qadtr_brevitas.core.errors import QadtrError


def rename_old_keys(node: YamlNode, owner: object) -> None:
    """Give every renamed or moved key below a node its new name, in place.

    Args:
        node: a mapping; anything else stays as it is.
        owner: the section or plug-in class whose keys the mapping holds.
    """
    fields = fields_of(owner)
    if node.children is None or node.is_list:
        return
    if owner is CalibrationSection:
        _move_calibration_keys(node.children)
    if owner is TransformSection:
        _keep_color_jitter(node.children)
    node.children = {renamed_key(str(key), fields) or key: child for key, child in node.children.items()}
    for key, child in node.children.items():
        if field := fields.get(str(key)):
            for member in _members(child):
                rename_old_keys(member, _owner(field, member))


def _move_calibration_keys(children: dict[int | str, YamlNode]) -> None:
    """Put the percentile into the method, and bias correction into the list of PTQ methods."""
    percentile, corrects = children.pop("percentile", None), children.pop("bias_correction", None)
    method = children.get("method")
    if percentile is not None and method is not None and method.scalar == "percentile":
        name = YamlNode(method.line, scalar=method.scalar)
        children["method"] = YamlNode(method.line, children={"name": name, "percentile": percentile})
    if corrects is not None and corrects.scalar is True:
        item = YamlNode(corrects.line, scalar="bias-correction")
        children["weights"] = YamlNode(corrects.line, children={0: item}, is_list=True)


def _keep_color_jitter(children: dict[int | str, YamlNode]) -> None:
    """Say that color jitter is meant beside RandAugment: earlier releases applied both without being told."""
    both = [node.scalar for key in ("rand_augment", "color_jitter") if (node := children.get(key))]
    if len(both) == 2 and all(both) and "force_color_jitter" not in children:
        children["force_color_jitter"] = YamlNode(children["color_jitter"].line, scalar=True)


def _members(node: YamlNode) -> list[YamlNode]:
    return list((node.children or {}).values()) if node.is_list else [node]


def _owner(field: FieldInfo, node: YamlNode) -> object:
    """Return the section or plug-in class that a value of a field holds; None where it holds neither."""
    slot = slot_in(field.annotation, field.metadata)
    return section_in(field.annotation) if slot is None else _plugin(slot, node)


def _plugin(slot: Slot, node: YamlNode) -> object:
    name = next((child.scalar for key in (slot.key, "name") if (child := (node.children or {}).get(key))), None)
    try:
        return slot.registry.load(str(name))
    except QadtrError:
        # Validation of the recipe reports it, with its line.
        return None
