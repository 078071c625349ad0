"""What every plug-in is: a frozen keyword-only dataclass whose fields are its recipe keys.

    @dataclass(frozen=True, kw_only=True, config=STRICT)
    class Lavan:
        "Universal targeted patch (Karmon et al. 2018)."

        steps: Annotated[int, Field(ge=1, description="optimizer steps")] = 500
        surrogate: PrecisionField = Precision(32, 32)

`dataclass` is pydantic's, so values are checked wherever the plug-in is made, from a recipe or from Python.
A plug-in file imports torch and its friends inside methods only: recipes are checked before anything heavy loads.
"""

from typing import Annotated, TypeAlias

from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer
from pydantic.dataclasses import dataclass

from qadtr_brevitas.errors import UsageError
from qadtr_brevitas.precision import Precision, PrecisionLike

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)

__all__ = ["STRICT", "Field", "PrecisionField", "dataclass"]


def _read_precision(value: PrecisionLike) -> Precision:
    try:
        return Precision.parse(value)
    except UsageError as error:
        raise ValueError(str(error)) from error


def _write_precision(precision: Precision) -> int | str:
    return precision.weight if precision.is_tied else str(precision)


PrecisionField: TypeAlias = Annotated[Precision, BeforeValidator(_read_precision), PlainSerializer(_write_precision)]
"""Type of a field that holds a precision: reads 4, "4", "w4a8"; several are a `tuple[PrecisionField, ...]`."""
