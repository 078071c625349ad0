"""Records as tables: a line for each model and facet, a column for each precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from qadtr_brevitas.analyze.base import Record
from qadtr_brevitas.report.layout import EMPTY, Table, bits
from qadtr_brevitas.sources import sorted_accesses

Write: TypeAlias = Callable[[float], str]


def by_precision(
    title: str,
    records: Sequence[Record],
    what: str,
    *,
    write: Write,
    facets: Sequence[str],
    notes: Sequence[str] = (),
) -> Table:
    """One kind of number at each precision.

    Args:
        title: of the table.
        records: numbers of all kinds.
        what: the kind that is shown.
        write: how a number is written.
        facets: what tells lines apart, beside the model.
        notes: below the table.
    """
    shown = [record for record in records if record.what == what]
    columns = sorted_accesses({record.precision for record in shown})
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for record in shown:
        line = (record.model, *(str(record.facets.get(name, "")) for name in facets))
        cells.setdefault(line, {})[record.precision] = EMPTY if record.value is None else write(record.value)
    rows = tuple((*line, *(found.get(column, EMPTY) for column in columns)) for line, found in cells.items())
    return Table(title, ("model", *facets, *map(bits, columns)), rows, tuple(notes), labels=1 + len(facets))


def decimals(count: int) -> Write:
    """Numbers with so many figures that count, also where they are tiny."""
    return lambda value: f"{value:.{count}g}" if 0 < abs(value) < 10**-count else f"{value:.{count}f}"


def percents(value: float) -> str:
    """Shares in percent."""
    return f"{100 * value:.1f}"
