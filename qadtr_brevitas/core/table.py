"""One type for every table: drawn in the terminal, written as Markdown or CSV, or given as JSON objects."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from rich.console import RenderableType

Cell: TypeAlias = str | int | float | None
"""Text or a number; None is an empty cell, and null in JSON."""


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        title: what it shows.
        header: names of the columns.
        rows: the cells of each row; None separates blocks of rows.
        notes: sentences below the table.
        labels: how many columns, from the left, hold words; the others are aligned to the right.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...] | None, ...]
    notes: tuple[str, ...] = ()
    labels: int = 1

    def markdown(self) -> str:
        """Return GitHub-flavored Markdown: the title as a heading of level 2, the table, and the notes."""
        rule = "".join(" :-- |" if index < self.labels else " --: |" for index in range(len(self.header)))
        lines = [_markdown_line(self.header), f"|{rule}"]
        lines += [_markdown_line(_texts(row)) for row in self.rows if row is not None]
        notes = "\n".join(self.notes)
        return f"## {self.title}\n\n" + "\n".join(lines) + (f"\n\n{notes}" if notes else "")

    def csv(self) -> str:
        """Return the header and the rows as CSV, without title, separators and notes."""
        text = StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.header)
        writer.writerows(row for row in self.rows if row is not None)
        return text.getvalue()

    def records(self) -> list[dict[str, Cell]]:
        """Return an object for each row, from the names of the columns to the cells, for JSON."""
        return [dict(zip(self.header, row, strict=True)) for row in self.rows if row is not None]

    def rich(self) -> RenderableType:
        """Return the title, the table and the notes for a rich console."""
        from rich import box
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        drawn = RichTable(box=box.SIMPLE_HEAD)
        for index, name in enumerate(self.header):
            drawn.add_column(Text(name), justify="left" if index < self.labels else "right", overflow="fold")
        for row in self.rows:
            if row is None:
                drawn.add_section()
            else:
                drawn.add_row(*map(Text, _texts(row)))
        notes = [Text(note, style="dim") for note in self.notes]
        return Group(Text(self.title, style="bold"), drawn, *notes, Text())

    def rich_columns(self) -> RenderableType:
        """Return the rows alone for a rich console, as columns without title, header and notes."""
        from rich.table import Table as RichTable

        drawn = RichTable(box=None, pad_edge=False, show_header=False)
        for row in self.rows:
            if row is not None:
                drawn.add_row(*_texts(row))
        return drawn


def _texts(row: tuple[Cell, ...]) -> tuple[str, ...]:
    return tuple("" if cell is None else str(cell) for cell in row)


def _markdown_line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
