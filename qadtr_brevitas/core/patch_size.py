"""Sizes of patches: a rectangle of pixels, written `5` for a square and `3x10` for 3 rows of 10."""

import re
from dataclasses import dataclass
from typing import TypeAlias

from qadtr_brevitas.core.errors import UsageError

PatchSizeLike: TypeAlias = "int | str | tuple[int, int] | list[int] | PatchSize"

_PAIR = re.compile(r"(\d+)\s*x\s*(\d+)")
_RULE = "write 5 for 5x5 pixels, or 3x10 for 3 rows of 10"


@dataclass(frozen=True, order=True)
class PatchSize:
    """Height and width of a patch in pixels; `str()` and `parse()` are inverse.

    Raises:
        UsageError: a side is below 1.
    """

    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1:
            raise UsageError(f"a patch of {self.height}x{self.width} pixels is not possible: {_RULE}")

    @classmethod
    def parse(cls, value: PatchSizeLike) -> "PatchSize":
        """Read 5, "5", "3x10", (3, 10) or a PatchSize.

        Raises:
            UsageError: anything else.
        """
        if isinstance(value, PatchSize):
            return value
        if type(value) is int:
            return cls(value, value)
        if isinstance(value, (tuple, list)) and len(value) == 2 and all(type(side) is int for side in value):
            return cls(value[0], value[1])
        text = str(value).strip().lower()
        if text.isascii() and text.isdigit():
            return cls(int(text), int(text))
        if match := _PAIR.fullmatch(text):
            return cls(int(match[1]), int(match[2]))
        raise UsageError(f"the patch size {value!r} cannot be read: {_RULE}")

    @property
    def is_square(self) -> bool:
        """True where both sides are equal."""
        return self.height == self.width

    @property
    def pixels(self) -> int:
        """Pixels that it covers."""
        return self.height * self.width

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"
