"""Comparing a table of the paper with measurements: our value for each of its cells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeAlias

from qadtr_brevitas.core.precision import FLOAT_BITS
from qadtr_brevitas.core.table import Table
from qadtr_brevitas.evaluation.metrics import mean
from qadtr_brevitas.evaluation.report.layout import EMPTY, bits, blocks
from qadtr_brevitas.reproduce.page.measurements import AT_FLOAT, SEEN, UNSEEN, WHITE_BOX, Measurement
from qadtr_brevitas.reproduce.paper import SUBJECT, PaperTable

_DEFAULT_ATTACK = "lavan"
# Facets of the whole table that a measurement must have; the others are mentioned in a note only.
_REQUIRED_FACETS = ("attack", "patches")
_AS_IN_ROW = "as the row says"
# A share of fewer images has a 95 % interval of 20 points or more: its difference to the paper means nothing.
_FEWEST_IMAGES = 100


@dataclass(frozen=True)
class MeasuredCell:
    """Our value for one cell of a table of the paper.

    Args:
        value: mean over targets, patches and seeds; shares in [0, 1].
        interval: 95 % interval, if there is one.
        n: images of the smallest denominator.
        measurements: number of measurements that the value is a mean of.
    """

    value: float
    interval: tuple[float, float] | None
    n: int | None
    measurements: int


MeasuredRow: TypeAlias = tuple[MeasuredCell | None, ...]


@dataclass(frozen=True)
class PaperComparison:
    """A table of the paper and our value for each of its cells.

    Args:
        table: the paper's table.
        measured: for each origin of attacks, our rows, in the order of the table.
    """

    table: PaperTable
    measured: Mapping[str, tuple[MeasuredRow, ...]]

    @property
    def is_empty(self) -> bool:
        """Whether no cell of the table was measured."""
        return not any(cell for rows in self.measured.values() for row in rows for cell in row)


def compare(
    table: PaperTable, measurements: Sequence[Measurement], default_precisions: Mapping[str, str] | None = None
) -> PaperComparison:
    """Find our value for each cell of a table.

    Args:
        table: the paper's table.
        measurements: everything that was measured.
        default_precisions: for a table without precisions, the precision to use for a model, by its name.
    """
    known = [found for found in measurements if found.what == table.what and found.value is not None]
    finder = _CellFinder(table, known, default_precisions or {})
    measured = {
        origin: tuple(
            tuple(finder.find({**facets, **column}, origin) for column in table.columns) for facets, _ in table.rows
        )
        for origin in _origins(table)
    }
    return PaperComparison(table, measured)


@dataclass(frozen=True)
class _CellFinder:
    """Finds the measurements of one cell and averages them."""

    table: PaperTable
    measurements: Sequence[Measurement]
    default_precisions: Mapping[str, str]

    def find(self, cell: Mapping[str, str], origin: str) -> MeasuredCell | None:
        """Return our value for the cell with these facets."""
        wanted = {**{name: v for name, v in self.table.where.items() if name in _REQUIRED_FACETS}, **cell}
        found = [m for m in self.measurements if origin in (*m.origins, _AS_IN_ROW) and _matches(m, wanted)]
        if "attack" not in wanted:
            found = [m for m in found if m.facets.get("attack") == _DEFAULT_ATTACK] or found
        # Unseen patches are made on other networks as well, to be at a precision that was left out of training.
        if "source" not in wanted and wanted.get("patches") != UNSEEN:
            found = [m for m in found if m.facets.get("from") == "itself"] or found
        if "precision" not in wanted:
            precision = self._default_precision(found, wanted)
            found = [m for m in found if m.facets["precision"] == precision]
        return _average(found)

    def _default_precision(self, found: Iterable[Measurement], wanted: Mapping[str, str]) -> str | None:
        """Return the precision for a table without precisions: as given, 32 of float networks, 8, or the only one."""
        known = list(dict.fromkeys(m.facets["precision"] for m in found))
        models = {m.facets["model"] for m in found}
        given = next((self.default_precisions[model] for model in models if model in self.default_precisions), None)
        usual = str(FLOAT_BITS) if wanted.get(SUBJECT, "").startswith("FP") else "8"
        return next((precision for precision in (given, usual) if precision in known), known[0] if known else None)


def comparison_table(comparison: PaperComparison, *, notes: Sequence[str] = ()) -> Table:
    """Return a table with the paper's values, ours and the difference."""
    table = comparison.table
    write = _percent if table.unit == "percent" else _number
    rows = [
        (row_name(facets), _lines(numbers, {o: rows[index] for o, rows in comparison.measured.items()}, write))
        for index, (facets, numbers) in enumerate(table.rows)
    ]
    header = ("", "", *(" ".join(filter(None, (facet_text(*f) for f in column.items()))) for column in table.columns))
    unit = "In percent; differences in points. " if table.unit == "percent" else ""
    where = ", ".join(f"{name} {value}" for name, value in table.where.items())
    first = f"{unit}The paper says of the whole table: {where}." if where else unit.strip()
    cells = [cell for measured in comparison.measured.values() for row in measured for cell in row if cell]
    if any(_is_small(cell, write) for cell in cells):
        notes = (*notes, f"Values of fewer than {_FEWEST_IMAGES} images are not subtracted from the paper's.")
    return Table(
        f"{table.number} of the paper: {table.title}",
        header,
        blocks(rows),
        tuple(filter(None, (first, *notes))),
        labels=2,
    )


def row_name(facets: Mapping[str, str]) -> str:
    """Return the name of a row of the paper."""
    rest = dict(facets)
    transfer = f"{rest.pop('source')} to {rest.pop(SUBJECT)}" if "source" in rest else ""
    words = [transfer, *(facet_text(name, value) for name, value in rest.items())]
    return ", ".join(filter(None, words)) or "as made"


def facet_text(name: str, value: str) -> str:
    """Return a facet as text for a table; empty if it needs no mention."""
    if name in ("shift", "degrees"):
        return "" if value == "0" else f"shifted by {value}" if name == "shift" else f"rotated by {value} deg"
    if name == "made_at":
        return "" if value == "same" else f"made at {value} bit"
    formats: Mapping[str, Callable[[str], str]] = {
        "precision": bits,
        "kind": "{} attack".format,
        "patches": "{} patches".format,
        "region": "on the {}".format,
        "eps": "eps {}".format,
        "area": "area {}".format,
    }
    return formats[name](value) if name in formats else value


def _origins(table: PaperTable) -> tuple[str, ...]:
    """Return the origins of attacks to compare: both for success rates, where the paper names none in its rows."""
    if table.what == "asr":
        return (_AS_IN_ROW,) if any("made_at" in facets for facets, _ in table.rows) else (AT_FLOAT, WHITE_BOX)
    return (WHITE_BOX,) if table.what in ("accuracy", "clean accuracy") else (AT_FLOAT,)


def _matches(measurement: Measurement, wanted: Mapping[str, str]) -> bool:
    facets = measurement.facets
    # Patches that were shifted, or are unlike those of training, belong to tables of their own.
    if ("shift" in facets) > ("shift" in wanted) or facets.get("patches", SEEN) != wanted.get("patches", SEEN):
        return False
    # Unseen patches include those of other attacks.
    ignored = {"patches", "attack"} if wanted.get("patches") == UNSEEN else {"patches"}
    return all(_is_same(facets.get(name), value) for name, value in wanted.items() if name not in ignored)


def _is_same(one: str | None, other: str) -> bool:
    """Return whether two words differ in spelling only, such as ResNet20 and ResNet-20."""
    return one is not None and (one == other or _normalized(one) == _normalized(other))


def _normalized(word: str) -> str:
    # The point of a number is kept.
    return word if word.replace(".", "").isdigit() else "".join(filter(str.isalnum, word.lower()))


def _average(found: Sequence[Measurement]) -> MeasuredCell | None:
    if average := mean([m.share for m in found if m.share is not None]):
        return MeasuredCell(average.value, average.interval, average.n[0], average.shares)
    values = [m.value for m in found if m.value is not None]
    if not values:
        return None
    # The interval of a mean of means over the same images would need the images themselves.
    interval = found[0].interval if len(values) == 1 else None
    sizes = [m.n for m in found if m.n is not None]
    return MeasuredCell(fmean(values), interval, min(sizes) if sizes else None, len(values))


def _lines(
    paper: Sequence[float | None], measured: Mapping[str, MeasuredRow], write: Callable[[float], str]
) -> dict[str, list[str]]:
    """Return the lines of one row of the paper by their labels."""
    lines = {"paper": [EMPTY if value is None else write(value) for value in paper]}
    for origin, row in measured.items():
        suffix = f", {origin}" if len(measured) > 1 else ""
        lines[f"here{suffix}"] = [write(cell.value) if cell else EMPTY for cell in row]
        lines[f"difference{suffix}"] = [
            _signed(write(cell.value - value)) if cell and value is not None and not _is_small(cell, write) else EMPTY
            for cell, value in zip(row, paper, strict=True)
        ]
        lines[f"95 % interval{suffix}"] = [
            f"{write(cell.interval[0])} to {write(cell.interval[1])}" if cell and cell.interval else EMPTY
            for cell in row
        ]
        lines[f"n{suffix}"] = [str(cell.n) if cell and cell.n is not None else EMPTY for cell in row]
    return lines


def _is_small(cell: MeasuredCell, write: Callable[[float], str]) -> bool:
    """Return whether a cell is a share of too few images."""
    return write is _percent and cell.n is not None and cell.n < _FEWEST_IMAGES


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _number(value: float) -> str:
    return f"{value:.4f}"


def _signed(text: str) -> str:
    return text if text.startswith("-") else f"+{text}"
