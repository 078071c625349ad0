"""Precision: a pair of bit-widths, one for weights and one for activations; or the name of a mixed precision."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from qadtr_brevitas.core.errors import UsageError

FLOAT_BITS = 32
MIN_BITS, MAX_BITS = 2, 16
DEFAULT_BITS = (32, 8, 5, 4, 2)

PrecisionLike: TypeAlias = "int | str | tuple[int, int] | list[int] | Precision"

_PAIR = re.compile(r"w(\d+)a(\d+)")
_MIXED = "mixed:"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_RULE = f"bit-widths are {MIN_BITS} to {MAX_BITS}, or {FLOAT_BITS} for not quantized; write 4 or w4a8"


@dataclass(frozen=True, order=True)
class Precision:
    """Bit-widths of weights and activations; 32 means not quantized, exactly.

    Written `w4a8`, or just `4` where both are equal; `str()` and `parse()` are inverse. A mixed precision, written
    `mixed:NAME`, has no bit-widths of its own, but one per layer (`core.layer_bits`): both numbers are then 0.

    Raises:
        UsageError: a bit-width outside 2..16 that is not 32, or a name that is not possible.
    """

    weight: int
    act: int
    name: str = ""

    def __post_init__(self) -> None:
        if self.name:
            if (self.weight, self.act) != (0, 0) or not _NAME.fullmatch(self.name):
                raise UsageError(
                    f"{_MIXED}{self.name} is not possible: names of mixed precisions are of a to z, 0 to 9, - and _"
                )
            return
        for bits in (self.weight, self.act):
            if bits != FLOAT_BITS and not MIN_BITS <= bits <= MAX_BITS:
                raise UsageError(f"precision w{self.weight}a{self.act} is not possible: {_RULE}")

    @classmethod
    def parse(cls, value: PrecisionLike) -> "Precision":
        """Read 4, "4", "w4a8", (4, 8) or a Precision.

        Raises:
            UsageError: anything else, or a bit-width that is not possible.
        """
        if isinstance(value, Precision):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return cls(value, value)
        if isinstance(value, (tuple, list)) and len(value) == 2 and all(type(bits) is int for bits in value):
            return cls(value[0], value[1])
        text = str(value).strip().lower()
        if text.startswith(_MIXED) and text != _MIXED:
            return cls.mixed(text.removeprefix(_MIXED))
        if text.isascii() and text.isdigit():
            return cls(int(text), int(text))
        if match := _PAIR.fullmatch(text):
            return cls(int(match[1]), int(match[2]))
        raise UsageError(f"{value!r} is not a precision: {_RULE}")

    @classmethod
    def mixed(cls, name: str) -> "Precision":
        """Return the mixed precision of a name, which each layer knows its own bit-widths of.

        Raises:
            UsageError: the name is not possible.
        """
        return cls(0, 0, name)

    @property
    def is_mixed(self) -> bool:
        """True where each layer has bit-widths of its own."""
        return bool(self.name)

    @property
    def is_float(self) -> bool:
        """True where neither weights nor activations are quantized."""
        return self.weight == FLOAT_BITS and self.act == FLOAT_BITS

    @property
    def is_tied(self) -> bool:
        """True where weights and activations have the same bit-width."""
        return self.weight == self.act and not self.is_mixed

    def __str__(self) -> str:
        if self.is_mixed:
            return f"{_MIXED}{self.name}"
        return str(self.weight) if self.is_tied else f"w{self.weight}a{self.act}"


def parse_precisions(values: Iterable[PrecisionLike]) -> tuple[Precision, ...]:
    """Read several precisions, keeping their order and dropping repeats.

    Raises:
        UsageError: none given, or one that cannot be read.
    """
    precisions = tuple(dict.fromkeys(Precision.parse(value) for value in values))
    if not precisions:
        raise UsageError(f"no precision given: {_RULE}")
    return precisions
