"""Errors of pydantic as problems of a recipe: the key and the rule in plain words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, cast, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from qadtr_brevitas.config.renamed import moved_key, renamed_key
from qadtr_brevitas.core.errors import suggest

KeyPath: TypeAlias = tuple[int | str, ...]

_LOCATED = "located"
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_KINDS = {
    "int": "must be a whole number",
    "float": "must be a number",
    "finite": "must be a finite number",
    "bool": "must be true or false",
    "string": "must be text",
    "list": "must be a list",
    "tuple": "must be a list",
    "dict": "must be a mapping of keys to values",
    "model": "must be a mapping of keys to values",
    "dataclass": "must be a mapping of keys to values",
    "none": "must be null",
}


def located_error(errors: Iterable[tuple[KeyPath, str]]) -> PydanticCustomError:
    """Return an error for a validator to raise, with several messages, each at a key below the validated value."""
    errors = list(errors)
    text = "; ".join(f"{dotted(place)}: {message}" if place else message for place, message in errors)
    return PydanticCustomError(_LOCATED, "{text}", {"text": text, "errors": errors})


def explain(error: ValidationError, owner: type, data: Any) -> list[tuple[KeyPath, str]]:
    """Return every problem of a failed validation: its key and one sentence.

    Args:
        error: the error that pydantic raised.
        owner: the class that was validated; an unknown key is compared with its fields.
        data: the value that was validated.
    """
    found: dict[KeyPath, list[ErrorDetails]] = {}
    messages: list[tuple[KeyPath, str]] = []
    for item in error.errors(include_url=False):
        if item["type"] == _LOCATED:
            errors = cast("list[tuple[KeyPath, str]]", item.get("ctx", {})["errors"])
            messages += [(item["loc"] + place, message) for place, message in errors]
        elif not _is_short_by_faulty_items(item):
            found.setdefault(_without_union_names(item, owner, data), []).append(item)
    return messages + [(place, _sentence(items, owner, place)) for place, items in found.items()]


def fields_of(owner: Any) -> Mapping[str, FieldInfo]:
    """Return the fields of a recipe section or plug-in class; any other type has none."""
    return getattr(owner, "__pydantic_fields__", {})


def section_in(annotation: Any) -> Any:
    """Return the section or plug-in class inside a field's type, as in `Section | None`, or None."""
    if fields_of(annotation):
        return annotation
    return next((found for part in get_args(annotation) if (found := section_in(part))), None)


def dotted(place: KeyPath) -> str:
    """Return a key as it is written on the command line, `train.regularizers.0.weight`."""
    return ".".join(map(str, place))


def show(value: Any) -> str:
    """Return a value as errors quote it: text in quotation marks, with YAML's words, at most 60 characters."""
    words = {"True": "true", "False": "false", "None": "null"}
    text = words.get(repr(value), repr(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _sentence(items: list[ErrorDetails], owner: type, place: KeyPath) -> str:
    """Return one sentence for the errors of one key; several are the alternatives of a union."""
    first = items[0]
    if first["type"] in _UNKNOWN:
        key, fields = str(place[-1]), fields_of(_owner_of(owner, place[:-1]))
        if new := renamed_key(key, fields) or moved_key(key, fields):
            return f"is called {dotted((*place[:-1], new))}"
        return f"unknown key {key!r}: {suggest(key, fields)}"
    if first["type"] == "missing":
        return "is required"
    if first["type"] == "value_error" and len(items) == 1:
        return str(first.get("ctx", {}).get("error", first["msg"]))
    field = fields_of(_owner_of(owner, place[:-1])).get(str(place[-1])) if place else None
    rules = dict.fromkeys(_rule(item, field) for item in items)
    return f"{', or '.join(rules)}, got {show(first['input'])}"


def _is_short_by_faulty_items(item: ErrorDetails) -> bool:
    """Return whether pydantic calls a list too short only because it does not count its faulty items."""
    given = item["input"]
    return (
        item["type"] == "too_short"
        and isinstance(given, (list, tuple))
        and len(cast("list[Any]", given)) >= item.get("ctx", {})["min_length"]
    )


def _rule(item: ErrorDetails, field: FieldInfo | None) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind in ("literal_error", "enum"):
        return f"must be one of {str(context['expected']).replace(' or ', ', ').replace(chr(39), '')}"
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        return _range(context, field)
    if kind == "too_short":
        return f"must have at least {_items(context['min_length'])}"
    if kind == "too_long":
        return f"must have at most {_items(context['max_length'])}"
    if kind == "string_too_short":
        return "must not be empty"
    if kind == "value_error":
        return str(context.get("error", item["msg"]))
    return _KINDS.get(kind.partition("_")[0], item["msg"])


def _items(count: int) -> str:
    return "1 item" if count == 1 else f"{count} items"


def _range(context: Mapping[str, Any], field: FieldInfo | None) -> str:
    """Return the whole allowed range; pydantic names only the bound that was broken."""
    words = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}
    bounds = {name: context[name] for name in words if name in context}
    for constraint in field.metadata if field else ():
        bounds |= {name: getattr(constraint, name) for name in words if hasattr(constraint, name)}
    return "must be " + " and ".join(f"{words[name]} {bounds[name]}" for name in words if name in bounds)


def _without_union_names(item: ErrorDetails, owner: Any, data: Any) -> KeyPath:
    """Return the key of an error without the names that pydantic gives to the alternatives of a union."""
    place: list[int | str] = []
    for part in item["loc"]:
        fields = fields_of(owner)
        if isinstance(data, dict) and part in data:
            data = cast("dict[Any, Any]", data)[part]
        elif isinstance(data, (list, tuple)) and isinstance(part, int):
            data = cast("list[Any]", data)[part]
        elif part not in fields:
            break
        else:
            data = None
        owner = section_in(fields[part].annotation) if isinstance(part, str) and part in fields else None
        place.append(part)
    return tuple(place)


def _owner_of(owner: Any, place: KeyPath) -> Any:
    is_key = False
    for part in place:
        if is_key:
            # The user's own name for a section, in a mapping of sections.
            is_key = False
            continue
        field = fields_of(owner).get(str(part))
        owner = section_in(field.annotation) if field else None
        is_key = field is not None and get_origin(field.annotation) is dict
    return owner
