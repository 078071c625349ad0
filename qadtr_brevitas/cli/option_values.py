"""Kinds of values that options of several commands take: numbers and sizes of patches, with commas between them."""

from __future__ import annotations

import math

import click

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.patch_size import PatchSize


class Numbers(click.ParamType[tuple[int | float, ...]]):
    """Numbers with commas between them, as 6,12,18.

    Args:
        kind: int or float.
        rule: what they have to be, in words.
        least: the smallest allowed; None for any but 0.
        count: how many; None for any number of them.
    """

    name = "numbers"

    def __init__(self, kind: type[int] | type[float], rule: str, *, least: int | None = None, count: int | None = None):
        self.kind, self.rule, self.least, self.count = kind, rule, least, count

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int | float, ...]:
        """Read them."""
        try:
            found = tuple(self.kind(word) for word in value.split(","))
        except ValueError:
            found = ()
        if not found or len(found) != (self.count or len(found)) or not all(map(self._is_allowed, found)):
            self.fail(f"{value!r} is not {self.rule}", param, ctx)
        return tuple(dict.fromkeys(found)) if self.count is None else found

    def _is_allowed(self, number: float) -> bool:
        return math.isfinite(number) and (number != 0 if self.least is None else number >= self.least)


class PatchSizes(click.ParamType[tuple[PatchSize, ...]]):
    """Sizes of patches with commas between them, as 5,3x10."""

    name = "sizes"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[PatchSize, ...]:
        """Read them."""
        try:
            return tuple(dict.fromkeys(map(PatchSize.parse, value.split(","))))
        except UsageError as error:
            self.fail(str(error), param, ctx)


patch_size_option = click.option(
    "--patch-size",
    "patch_sizes",
    metavar="SIZE[,SIZE...]",
    type=PatchSizes(),
    help="Scale patches of your own to fit into these sizes, as 8 or 6x10.",
)
"""--patch-size, of patches of one's own."""
