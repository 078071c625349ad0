"""How the figures of a report are written in the cells of a table, and rows in labeled blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from qadtr_brevitas.evaluation.metrics import Mean
from qadtr_brevitas.evaluation.report.schema import Rate

EMPTY = "-"

Rows: TypeAlias = Mapping[str, Sequence[str]]
"""Label of a row -> its cells."""


def blocks(found: Iterable[tuple[str, Rows]]) -> tuple[tuple[str, ...] | None, ...]:
    """Labeled blocks of labeled rows; a row without any figure, and a block without any row, is left out."""
    rows: list[tuple[str, ...] | None] = []
    for name, block in found:
        full = {label: cells for label, cells in block.items() if any(cell != EMPTY for cell in cells)}
        rows += [(name if index == 0 else "", label, *full[label]) for index, label in enumerate(full)]
        rows += [None] if full else []
    return tuple(rows[:-1])


def bits(precision: str) -> str:
    """Return a precision as the title of a column."""
    return f"{precision} bit" if precision.isdigit() else precision


def percent(share: Mean | Rate | None) -> str:
    """Return a share in percent."""
    return EMPTY if share is None or share.value is None else f"{100 * share.value:.1f}"


def percent_range(bounds: tuple[float, float]) -> str:
    """Two shares in percent."""
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f}"


def percent_and_range(rate: Rate | None) -> str:
    """Return a share and its 95 % interval, in percent."""
    return EMPTY if rate is None or rate.value is None else f"{percent(rate)} ({percent_range((rate.low, rate.high))})"


def interval(mean: Mean | None) -> str:
    """Return the 95 % interval of a mean, in percent."""
    return percent_range(mean.interval) if mean else EMPTY


def sizes(mean: Mean | None) -> str:
    """Return the denominators of a mean."""
    if mean is None:
        return EMPTY
    return str(mean.n[0]) if mean.n[0] == mean.n[1] else f"{mean.n[0]} to {mean.n[1]}"
