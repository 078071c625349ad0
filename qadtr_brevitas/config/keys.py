"""The keys of a plug-in, with their allowed values, defaults and descriptions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from qadtr_brevitas.core.plugin import plugin_settings
from qadtr_brevitas.core.precision import Precision

if TYPE_CHECKING:
    from pydantic.json_schema import CoreSchemaOrField

_LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


@dataclass(frozen=True)
class Key:
    """One key of a plug-in.

    Args:
        name: as in a recipe or as in `key=value`.
        values: the allowed values, in words.
        default: the default as in a recipe, or None if the key must be given.
        description: what the key does.
    """

    name: str
    values: str
    default: str | None
    description: str


def plugin_keys(plugin: type) -> list[Key]:
    """Return the keys of a plug-in class, in the order in which it defines them."""
    schema = TypeAdapter(plugin).json_schema(schema_generator=_LenientSchema)
    definitions: dict[str, Any] = schema.get("$defs", {})
    required = schema.get("required", ())
    defaults = {} if required else plugin_settings(plugin())
    return [
        Key(
            name=name,
            values=_values(field, definitions),
            default=None if name in required else _short(defaults.get(name, field.get("default"))),
            description=field.get("description", ""),
        )
        for name, field in schema.get("properties", {}).items()
    ]


class _LenientSchema(GenerateJsonSchema):
    """A schema in which a value that a function reads, such as another plug-in, may be anything."""

    def handle_invalid_for_json_schema(self, schema: CoreSchemaOrField, error_info: str) -> dict[str, Any]:
        """Return a schema that allows everything."""
        return {}


def _short(value: JsonValue) -> str:
    """Return a value as YAML on one line; a plug-in is shortened to its name."""
    if isinstance(value, dict) and isinstance(name := value.get("name"), str):
        return name
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def _values(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    if reference := field.get("$ref"):
        name = reference.rpartition("/")[2]
        return "precision" if name == Precision.__name__ else _values(definitions[name], definitions)
    if options := field.get("anyOf"):
        return " or ".join(dict.fromkeys(_values(option, definitions) for option in options))
    if choices := field.get("enum", [field["const"]] if "const" in field else None):
        return ", ".join(map(str, choices))
    kind = str(field.get("type", "plug-in"))
    limits = " and ".join(f"{sign} {field[name]:g}" for name, sign in _LIMITS.items() if name in field)
    if kind == "array":
        inner = field.get("items") or next(iter(field.get("prefixItems", ())), {})
        return f"list of {_values(inner, definitions)}"
    return f"{kind} {limits}".strip()
