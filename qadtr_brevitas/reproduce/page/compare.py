"""A table of the paper with our figures beside its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from qadtr_brevitas.core.precision import FLOAT_BITS
from qadtr_brevitas.evaluation.metrics import mean
from qadtr_brevitas.evaluation.report.layout import EMPTY, Table, bits, blocks
from qadtr_brevitas.reproduce.page.measures import AT_FLOAT, SEEN, UNSEEN, WHITE_BOX, Measure
from qadtr_brevitas.reproduce.paper import SUBJECT, PaperTable

_ATTACK = "lavan"
# What is said of a whole table and has to hold for a figure to stand beside it; the rest is told in a note.
_BINDING = ("attack", "patches")
_AS_SAID = "as the row says"


@dataclass(frozen=True)
class MeasuredValue:
    """Our figure beside one of the paper.

    Args:
        value: mean over targets, patches and seeds; shares in [0, 1].
        interval: 95 % interval, where there is one.
        n: images of the smallest denominator.
        figures: how many figures the mean is of.
    """

    value: float
    interval: tuple[float, float] | None
    n: int | None
    figures: int


@dataclass(frozen=True)
class PaperComparison:
    """A table of the paper and what was measured for each of its places.

    Args:
        table: the paper's.
        ours: for each way attacks are made, row by row, our figure at each column.
    """

    table: PaperTable
    ours: Mapping[str, tuple[tuple[MeasuredValue | None, ...], ...]]

    @property
    def is_empty(self) -> bool:
        """True where nothing was measured that has a place in the table."""
        return not any(found for rows in self.ours.values() for row in rows for found in row)


def compare(table: PaperTable, measures: Sequence[Measure], at: Mapping[str, str] | None = None) -> PaperComparison:
    """Finds our figure for each place of a table.

    Args:
        table: the paper's.
        measures: what was measured.
        at: for a table that names no precision, the precision to take of each model.
    """
    known = [measure for measure in measures if measure.what == table.what and measure.value is not None]
    ways = _ways(table)
    return PaperComparison(
        table,
        {
            way: tuple(
                tuple(_find(table, {**facets, **column}, known, way, at or {}) for column in table.columns)
                for facets, _ in table.rows
            )
            for way in ways
        },
    )


def _ways(table: PaperTable) -> tuple[str, ...]:
    """How attacks are made: the paper leaves it open for success rates, unless a row says it."""
    if table.what == "asr":
        return (_AS_SAID,) if any("made_at" in facets for facets, _ in table.rows) else (AT_FLOAT, WHITE_BOX)
    return (WHITE_BOX,) if table.what in ("accuracy", "clean accuracy") else (AT_FLOAT,)


def _find(
    table: PaperTable, where: Mapping[str, str], measures: Sequence[Measure], way: str, at: Mapping[str, str]
) -> MeasuredValue | None:
    wanted = {**{name: value for name, value in table.where.items() if name in _BINDING}, **where}
    found = [measure for measure in measures if way in (*measure.made, _AS_SAID) and _fits(measure, wanted)]
    if "attack" not in wanted and any(measure.facets.get("attack") == _ATTACK for measure in found):
        found = [measure for measure in found if measure.facets.get("attack") == _ATTACK]
    own = [measure for measure in found if measure.facets.get("from") == "itself"]
    # Unseen patches are made on other networks too, to be at a precision that was left out.
    if own and "source" not in wanted and wanted.get("patches") != UNSEEN:
        found = own
    if "precision" not in wanted:
        found = [measure for measure in found if measure.facets["precision"] == _precision(found, wanted, at)]
    return _average(found)


def _fits(measure: Measure, wanted: Mapping[str, str]) -> bool:
    facets = measure.facets
    # Patches that were moved, or are unlike those of training, stand in tables of their own only.
    if ("shift" in facets) > ("shift" in wanted) or facets.get("patches", SEEN) != wanted.get("patches", SEEN):
        return False
    free = {"patches"}
    # Other attacks are among the unseen patches.
    free |= {"attack"} if wanted.get("patches") == UNSEEN else set()
    return all(_same(facets.get(name), value) for name, value in wanted.items() if name not in free)


def _same(one: str | None, other: str) -> bool:
    """True for words that differ in spelling only, such as ResNet20 and ResNet-20."""
    return one is not None and (one == other or _plain(one) == _plain(other))


def _plain(word: str) -> str:
    # Numbers keep their points.
    return word if word.replace(".", "").isdigit() else "".join(filter(str.isalnum, word.lower()))


def _precision(found: Iterable[Measure], wanted: Mapping[str, str], at: Mapping[str, str]) -> str | None:
    """The precision of a model in a table that names none: 32 of float networks, else 8, else the only one."""
    there = list(dict.fromkeys(measure.facets["precision"] for measure in found))
    models = {measure.facets["model"] for measure in found}
    chosen = next((at[model] for model in models if model in at), None)
    guess = str(FLOAT_BITS) if wanted.get(SUBJECT, "").startswith("FP") else "8"
    return next((precision for precision in (chosen, guess) if precision in there), there[0] if there else None)


def _average(found: Sequence[Measure]) -> MeasuredValue | None:
    shares = [measure.share for measure in found if measure.share is not None]
    if average := mean(shares):
        return MeasuredValue(average.value, average.interval, average.n[0], average.shares)
    values = [measure.value for measure in found if measure.value is not None]
    if not values:
        return None
    # Of several means over the same images no interval can be given without the images themselves.
    interval = found[0].interval if len(values) == 1 else None
    sizes = [measure.n for measure in found if measure.n is not None]
    return MeasuredValue(sum(values) / len(values), interval, min(sizes) if sizes else None, len(values))


def comparison_table(comparison: PaperComparison, *, notes: Sequence[str] = ()) -> Table:
    """The paper's figures, ours and the difference."""
    table = comparison.table
    write = _percent if table.unit == "percent" else _number
    rows = [
        (row_name(facets), _lines(numbers, {way: rows[index] for way, rows in comparison.ours.items()}, write))
        for index, (facets, numbers) in enumerate(table.rows)
    ]
    header = ("", "", *map(_column_name, table.columns))
    unit = "In percent; differences in points. " if table.unit == "percent" else ""
    said = ", ".join(f"{name} {value}" for name, value in table.where.items())
    first = f"{unit}The paper says of the whole table: {said}." if said else unit.strip()
    return Table(
        f"{table.number} of the paper: {table.title}",
        header,
        blocks(rows),
        tuple(filter(None, (first, *notes))),
        labels=2,
    )


def _lines(
    paper: Sequence[float | None], ours: Mapping[str, Sequence[MeasuredValue | None]], write: Callable[[float], str]
) -> dict[str, list[str]]:
    lines = {"paper": [EMPTY if value is None else write(value) for value in paper]}
    for way, found in ours.items():
        label = f"here, {way}" if len(ours) > 1 else "here"
        lines[label] = [write(our.value) if our else EMPTY for our in found]
        lines[f"difference{label.removeprefix('here')}"] = [
            EMPTY if our is None or value is None else _signed(write(our.value - value))
            for our, value in zip(found, paper, strict=True)
        ]
        lines[f"95 % interval{label.removeprefix('here')}"] = [
            f"{write(our.interval[0])} to {write(our.interval[1])}" if our and our.interval else EMPTY for our in found
        ]
        lines[f"n{label.removeprefix('here')}"] = [str(our.n) if our and our.n is not None else EMPTY for our in found]
    return lines


def row_name(facets: Mapping[str, str]) -> str:
    """How a row of the paper is called."""
    words = dict(facets)
    moved = f"{words.pop('source')} to {words.pop(SUBJECT)}" if "source" in words else ""
    named = [moved, *(facet_word(name, value) for name, value in words.items())]
    return ", ".join(filter(None, named)) or "as made"


def _column_name(facets: Mapping[str, str]) -> str:
    return " ".join(filter(None, (facet_word(name, value) for name, value in facets.items())))


def facet_word(name: str, value: str) -> str:
    """How a facet of the paper is said in a table; nothing for one that goes without saying."""
    if name in ("shift", "degrees"):
        return "" if value == "0" else f"shifted by {value}" if name == "shift" else f"turned by {value} deg"
    if name == "made_at":
        return "" if value == "same" else f"made at {value} bit"
    if name == "patches":
        return f"{value} patches"
    if name == "region":
        return f"on the {value}"
    words = {"precision": bits, "kind": "{} attack".format}
    if name in words:
        return words[name](value)
    return f"{name} {value}" if name in ("eps", "np") else value


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _number(value: float) -> str:
    return f"{value:.4f}"


def _signed(text: str) -> str:
    return text if text.startswith("-") else f"+{text}"
