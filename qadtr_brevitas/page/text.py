"""A page as Markdown and as CSV."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from io import StringIO
from pathlib import Path

from qadtr_brevitas.page.blocks import Block, Page
from qadtr_brevitas.report.files import markdown_table


def markdown(page: Page, folder: Path) -> str:
    """The page as GitHub-flavored Markdown; pictures of folders are linked, curves of the page itself left out.

    Args:
        page: what to write.
        folder: where the file will lie, which links start from.
    """
    parts = [f"# {page.title}"]
    for section in page.sections:
        parts.append(f"{'#' * section.level} {section.title}")
        parts.append(_facts(section.facts))
        parts += [f"- {remark}" for remark in section.remarks]
        # What the audit says is told once, above the first table it concerns.
        told: set[tuple[str, ...]] = set()
        for block in section.blocks:
            parts += [f"> Audit: {text}" for text in block.warnings if block.warnings not in told]
            told.add(block.warnings)
            parts += _block(block, folder)
    return "\n\n".join([*parts, "## About this page", _facts(page.facts)]) + "\n"


def page_csv(page: Page) -> str:
    """Every cell of every table on a line of its own."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["section", "table", "row", "column", "value"])
    for section in page.sections:
        for block in section.blocks:
            if block.table is not None:
                writer.writerows([section.title, *line] for line in _cells(block))
    return text.getvalue()


def _cells(block: Block) -> list[tuple[str, str, str, str]]:
    table = block.table
    assert table is not None
    lines: list[tuple[str, str, str, str]] = []
    first = ""
    for row in filter(None, table.rows):
        # Blocks name themselves on their first line only.
        first = row[0] or first
        name = " / ".join(filter(None, (first, *row[1 : table.labels])))
        columns = zip(table.header[table.labels :], row[table.labels :], strict=True)
        lines += [(table.title, name, column, value) for column, value in columns]
    return lines


def _block(block: Block, folder: Path) -> list[str]:
    parts = [markdown_table(block.table).replace("## ", "#### ", 1)] if block.table else []
    if block.image and block.image.path:
        link = Path(os.path.relpath(block.image.path.resolve(), folder.resolve())).as_posix()
        parts.append(f"![{block.image.caption}]({link.replace(' ', '%20')})")
    return parts


def _facts(facts: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {f'`{text}`' if name == 'command' else text}" for name, text in facts.items())
