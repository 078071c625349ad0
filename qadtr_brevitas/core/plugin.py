"""The decorator every plug-in class wears: a frozen keyword-only dataclass whose fields are its recipe keys.

    @plugin
    class Lavan:
        "Universal targeted patch (Karmon et al. 2018)."

        steps: Annotated[int, Field(ge=1, description="optimizer steps")] = 500
        surrogate: PrecisionField = Precision(32, 32)

Values are checked by pydantic wherever the plug-in is made, from a recipe or from Python.
"""

from typing import Annotated, TypeAlias, TypeVar, dataclass_transform

from pydantic import BeforeValidator, ConfigDict, Field, JsonValue, PlainSerializer, TypeAdapter
from pydantic.dataclasses import dataclass

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.patch_size import PatchSize, PatchSizeLike
from qadtr_brevitas.core.precision import Precision, PrecisionLike

__all__ = ["Field", "PatchSizeField", "PrecisionField", "plugin", "plugin_settings"]

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)

PluginClass = TypeVar("PluginClass", bound=type)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def plugin(cls: PluginClass) -> PluginClass:
    """Make a class a plug-in: frozen, keyword-only, its values checked, unknown keys refused."""
    return dataclass(frozen=True, kw_only=True, config=_STRICT)(cls)  # pyright: ignore[reportReturnType]


def plugin_settings(plugin: object) -> dict[str, JsonValue]:
    """Return the fields of a plug-in as JSON values, as a recipe would hold them."""
    return TypeAdapter(type(plugin)).dump_python(plugin, mode="json")


def _read_precision(value: PrecisionLike) -> Precision:
    try:
        return Precision.parse(value)
    except UsageError as error:
        raise ValueError(str(error)) from error


def _write_precision(precision: Precision) -> int | str:
    return precision.weight if precision.is_tied else str(precision)


PrecisionField: TypeAlias = Annotated[Precision, BeforeValidator(_read_precision), PlainSerializer(_write_precision)]
"""Type of a field that holds a precision: reads 4, "4", "w4a8"; several are a `tuple[PrecisionField, ...]`."""


def _read_patch_size(value: PatchSizeLike) -> PatchSize:
    try:
        return PatchSize.parse(value)
    except UsageError as error:
        raise ValueError(str(error)) from error


def _write_patch_size(size: PatchSize) -> int | str:
    return size.height if size.is_square else str(size)


PatchSizeField: TypeAlias = Annotated[PatchSize, BeforeValidator(_read_patch_size), PlainSerializer(_write_patch_size)]
"""Type of a field that holds the size of a patch: reads 5, "5", "3x10"."""
