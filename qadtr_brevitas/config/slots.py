"""A slot: a recipe key whose value is a plug-in, `{name: lavan, steps: 200}` or just `lavan`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from pydantic import GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, core_schema

from qadtr_brevitas.config.problems import explain, located_error, show
from qadtr_brevitas.core.errors import QadtrError
from qadtr_brevitas.core.plugin import plugin_settings
from qadtr_brevitas.core.registry import REGISTRIES, Registry, resolve


# Compared by identity, because typing hashes annotations and a registry holds a dict.
@dataclass(frozen=True, eq=False)
class Slot:
    """Annotation of a field that holds a plug-in of one registry.

    Args:
        registry: where the names come from.
        key: the key that holds the name; `name` is understood as well.
        contract: "package.module:Class" that the plug-ins must derive from, where that of their kind is not enough.
        advice: what errors say about a plug-in that does not derive from `contract`.
    """

    registry: Registry
    key: str = "name"
    contract: str | None = None
    advice: str = ""

    @property
    def _rule(self) -> str:
        kind = self.registry.kind
        return f"must name {'an' if kind[0] in 'aeiou' else 'a'} {kind}"

    def read(self, value: Any) -> Any:
        """Return the plug-in that a value describes; a finished plug-in is returned as it is.

        Raises:
            PydanticCustomError: the value describes none, or one that does not fit.
        """
        plugin = self._read(value)
        if self.contract and not isinstance(plugin, resolve(self.contract)):
            name = self.contract.partition(":")[2]
            kind = self.registry.kind
            raise located_error([((), f"{kind} {self.name_of(plugin)!r} is not a {name}, {self.advice}")])
        return plugin

    def _read(self, value: Any) -> Any:
        if isinstance(value, str):
            value = {self.key: value}
        if isinstance(value, dict):
            return self._make({str(key): item for key, item in value.items()})
        if not isinstance(value, (list, bool, int, float, type(None))) and self.name_of(value):
            return value
        rule = f"{self._rule} or be a mapping with the key {self.key!r}"
        raise located_error([((), f"{rule}, got {show(value)}")])

    def write(self, plugin: Any) -> dict[str, Any]:
        """Return a plug-in as recipe keys with all fields, which `read` turns into an equal plug-in."""
        return {self.key: slot_name(plugin), **plugin_settings(plugin)}

    def _make(self, fields: dict[str, Any]) -> Any:
        key = next((key for key in (self.key, "name") if key in fields), None)
        name = fields.pop(key) if key else None
        if key is None or not isinstance(name, str):
            rule = f"{self._rule}: choose from {', '.join(self.registry.names())}"
            raise located_error([((key or self.key,), rule)])
        name, named = self.registry.divide(name)
        if twice := named.keys() & fields:
            raise located_error([((twice.pop(),), "stands in the name already, after the slash: give it once")])
        fields |= named
        try:
            plugin = self.registry.load(name)
        except QadtrError as error:
            raise located_error([((key,), str(error))]) from error
        try:
            return TypeAdapter(plugin).validate_python(fields)
        except ValidationError as error:
            raise located_error(explain(error, plugin, fields)) from error
        except QadtrError as error:
            raise located_error([((), str(error))]) from error

    def name_of(self, plugin: object) -> str | None:
        """Return the name that the class of a plug-in has in the registry, or None."""
        return self.registry.name_of(type(plugin))

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.read, serialization=core_schema.plain_serializer_function_ser_schema(self.write)
        )


def slot_name(plugin: object) -> str:
    """Return the name that a plug-in is registered under.

    Raises:
        LookupError: its class is in no registry.
    """
    for registry in REGISTRIES.values():
        if name := Slot(registry).name_of(plugin):
            return name
    raise LookupError(f"{type(plugin).__name__} is in no registry")


def slot_in(annotation: Any, metadata: list[Any] | None = None) -> Slot | None:
    """Return the slot inside a field's type, or None, for instance in `list[Annotated[Any, Slot(...)]]`."""
    for part in (*(metadata or ()), *getattr(annotation, "__metadata__", ())):
        if isinstance(part, Slot):
            return part
    return next((slot for part in get_args(annotation) if (slot := slot_in(part))), None)
