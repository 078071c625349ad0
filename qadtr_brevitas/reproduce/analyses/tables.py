"""Records as tables: a line for each model and combination of facets, a column for each precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from qadtr_brevitas.core.table import Table
from qadtr_brevitas.evaluation.report.layout import EMPTY, bits
from qadtr_brevitas.quant.inference import sorted_modes
from qadtr_brevitas.reproduce.analyses.document import Record

FormatNumber: TypeAlias = Callable[[float], str]


def precision_table(
    title: str,
    records: Sequence[Record],
    what: str,
    *,
    write: FormatNumber,
    facets: Sequence[str],
    notes: Sequence[str] = (),
) -> Table:
    """Return a table of one quantity at each precision.

    Args:
        title: title of the table.
        records: records of all quantities.
        what: the quantity that is shown.
        write: formats a number.
        facets: the facets that distinguish lines, besides the model.
        notes: sentences below the table.
    """
    shown = [record for record in records if record.what == what]
    columns = sorted_modes({record.precision for record in shown})
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for record in shown:
        line = (record.model, *(str(record.facets.get(name, "")) for name in facets))
        cells.setdefault(line, {})[record.precision] = EMPTY if record.value is None else write(record.value)
    rows = tuple((*line, *(found.get(column, EMPTY) for column in columns)) for line, found in cells.items())
    return Table(title, ("model", *facets, *map(bits, columns)), rows, tuple(notes), labels=1 + len(facets))


def decimals(count: int) -> FormatNumber:
    """Return a format with `count` decimals, or, for numbers that would be 0, with `count` significant digits."""
    return lambda value: f"{value:.{count}g}" if 0 < abs(value) < 10**-count else f"{value:.{count}f}"


def percents(value: float) -> str:
    """Return a share in percent, with one decimal."""
    return f"{100 * value:.1f}"
