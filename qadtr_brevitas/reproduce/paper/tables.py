"""The tables and figures of the paper, read from tables.yaml."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import product
from typing import Literal, TypeAlias, cast

from qadtr_brevitas.config.source import parse
from qadtr_brevitas.core.document import Document
from qadtr_brevitas.core.errors import UsageError, suggest

SUBJECT = "subject"
"""The facet that names a model or defense."""

Unit: TypeAlias = Literal["percent", "number"]
_Scalar: TypeAlias = str | int | float


@dataclass(frozen=True)
class PaperValue:
    """One number of the paper.

    Args:
        where: the facets that distinguish it within its table, as text.
        value: the number; percents are shares in [0, 1].
    """

    where: Mapping[str, str]
    value: float


@dataclass(frozen=True)
class PaperTable:
    """A table or figure of the paper.

    Args:
        name: its name, such as `table11` or `figure04`.
        title: what it shows.
        what: the quantity: `asr`, `accuracy`, `clean accuracy`, `cosine` or `picture`.
        unit: `percent` if values are shares.
        where: facets of the whole table.
        columns: facets of each column.
        rows: facets of each row, and a number for each column, None if there is none.
        notes: what the paper leaves open, and where it contradicts itself.
    """

    name: str
    title: str
    what: str
    unit: Unit
    where: Mapping[str, str]
    columns: tuple[Mapping[str, str], ...]
    rows: tuple[tuple[Mapping[str, str], tuple[float | None, ...]], ...]
    notes: tuple[str, ...] = ()

    @property
    def number(self) -> str:
        """Its number in the paper, for instance `Table 11`."""
        kind = "Table" if self.name.startswith("table") else "Figure"
        return f"{kind} {int(self.name.removeprefix(kind.lower()))}"

    def values(self) -> Iterator[PaperValue]:
        """Yield every number, row by row."""
        for facets, numbers in self.rows:
            for column, number in zip(self.columns, numbers, strict=True):
                if number is not None:
                    yield PaperValue({**facets, **column}, number)

    def subjects(self) -> list[str]:
        """Return the models and defenses it names."""
        return list(dict.fromkeys(value.where[SUBJECT] for value in self.values() if SUBJECT in value.where))


class _TableEntry(Document):
    """A table in tables.yaml; a row is its facets and then its numbers, in the order of the columns."""

    title: str
    what: str
    unit: Unit
    where: dict[str, _Scalar] = {}
    columns: dict[str, tuple[_Scalar, ...]]
    rows: tuple[tuple[dict[str, _Scalar] | float | None, ...], ...]
    notes: tuple[str, ...] = ()


def paper_table(name: str) -> PaperTable:
    """Return a table or figure by its name.

    Raises:
        UsageError: the paper has no table or figure of that name (the nearest name is offered).
    """
    tables = paper_tables()
    if name not in tables:
        raise UsageError(f"the paper has no {name!r} to compare with: {suggest(name, tables)}")
    return tables[name]


@cache
def paper_tables() -> dict[str, PaperTable]:
    """Return every table and figure by name, in the order of the paper."""
    text = files("qadtr_brevitas.reproduce.paper").joinpath("tables.yaml").read_text(encoding="utf-8")
    content = cast("dict[str, object]", parse(text, line=1).plain())
    return {name: _table(name, _TableEntry.model_validate(entry)) for name, entry in content.items()}


def _table(name: str, entry: _TableEntry) -> PaperTable:
    scale = 100 if entry.unit == "percent" else 1
    rows: list[tuple[Mapping[str, str], tuple[float | None, ...]]] = []
    for facets, *values in entry.rows:
        assert isinstance(facets, dict), f"a row of {name} must begin with its facets"
        numbers = (value for value in values if not isinstance(value, dict))
        rows.append((_as_text(facets), tuple(value and value / scale for value in numbers)))
    return PaperTable(
        name=name,
        title=entry.title,
        what=entry.what,
        unit=entry.unit,
        where=_as_text(entry.where),
        columns=tuple(
            _as_text(dict(zip(entry.columns, chosen, strict=True))) for chosen in product(*entry.columns.values())
        ),
        rows=tuple(rows),
        notes=entry.notes,
    )


def _as_text(facets: Mapping[str, _Scalar]) -> dict[str, str]:
    return {name: str(value) for name, value in facets.items()}
