"""What the paper reports, as data: every table and figure that a measurement can be compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from itertools import product
from typing import Any, Literal

from qadtr_brevitas.config.source import parse
from qadtr_brevitas.core.errors import UsageError, suggest

SUBJECT = "subject"
"""The facet that names a model or defense."""


@dataclass(frozen=True)
class PaperValue:
    """One number of the paper.

    Args:
        where: what tells it from the others of its table: facet -> value, as text.
        value: as printed, percents as shares in [0, 1].
    """

    where: Mapping[str, str]
    value: float


@dataclass(frozen=True)
class PaperTable:
    """A table or figure of the paper.

    Args:
        name: such as `table11` or `figure04`.
        title: what it shows.
        what: `asr`, `accuracy`, `clean accuracy`, `cosine` or `picture`.
        unit: `percent` where values are shares.
        where: what is said of the whole table.
        columns: facets of each column.
        rows: facets of each row, and a number, or None where there is none, for each column.
        notes: what it leaves open, and where it contradicts the rest of the paper.
    """

    name: str
    title: str
    what: str
    unit: Literal["percent", "number"]
    where: Mapping[str, str]
    columns: tuple[Mapping[str, str], ...]
    rows: tuple[tuple[Mapping[str, str], tuple[float | None, ...]], ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def number(self) -> str:
        """How the paper calls it, for instance `Table 11`."""
        kind = "Table" if self.name.startswith("table") else "Figure"
        return f"{kind} {int(self.name.removeprefix(kind.lower()))}"

    def values(self) -> Iterator[PaperValue]:
        """Every number, row by row."""
        for facets, numbers in self.rows:
            for column, number in zip(self.columns, numbers, strict=True):
                if number is not None:
                    yield PaperValue({**facets, **column}, number)

    def subjects(self) -> list[str]:
        """The models and defenses it names."""
        return list(dict.fromkeys(value.where[SUBJECT] for value in self.values() if SUBJECT in value.where))


def paper_table(name: str) -> PaperTable:
    """A table or figure by its name.

    Raises:
        UsageError: there is none of that name here (the nearest is offered).
    """
    tables = paper_tables()
    if name not in tables:
        raise UsageError(f"the paper has no {name!r} to compare with: {suggest(name, tables)}")
    return tables[name]


@cache
def paper_tables() -> dict[str, PaperTable]:
    """Every table and figure by name, in the order of the paper."""
    text = files("qadtr_brevitas.reproduce.paper").joinpath("tables.yaml").read_text(encoding="utf-8")
    content: dict[str, dict[str, Any]] = parse(text, line=1).plain()
    return {name: _table(name, facts) for name, facts in content.items()}


def _table(name: str, facts: Mapping[str, Any]) -> PaperTable:
    scale = 100 if facts["unit"] == "percent" else 1
    columns = facts["columns"]
    return PaperTable(
        name=name,
        title=facts["title"],
        what=facts["what"],
        unit=facts["unit"],
        where=_words(facts.get("where", {})),
        columns=tuple(_words(dict(zip(columns, chosen, strict=True))) for chosen in product(*columns.values())),
        rows=tuple((_words(row[0]), tuple(_scaled(value, scale) for value in row[1:])) for row in facts["rows"]),
        notes=tuple(facts.get("notes", ())),
    )


def _words(facets: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in facets.items()}


def _scaled(value: float | None, scale: int) -> float | None:
    return None if value is None else value / scale
