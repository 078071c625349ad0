"""Writes a page: HTML to read, and the same tables as Markdown and CSV beside it.

A page as one HTML file that needs nothing else: no scripts, no fonts, no files beside it.

A page as Markdown and as CSV.
"""

from __future__ import annotations

import csv
import os
from base64 import b64encode
from collections.abc import Mapping
from importlib.resources import files
from io import StringIO
from pathlib import Path

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.extras import require
from qadtr_brevitas.core.files import write_atomically
from qadtr_brevitas.evaluation.report.files import markdown_table
from qadtr_brevitas.reproduce.page.blocks import Block, Page


def html(page: Page) -> str:
    """The page as HTML; whatever names and captions hold is escaped."""
    require("jinja2", extra="report", purpose="report")
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters["data_uri"] = _data_uri
    template = files("qadtr_brevitas.reproduce.page").joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(page=page)


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{b64encode(png).decode()}"


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


_SUFFIXES = (".html", ".htm")


def write_page(page: Page, path: Path) -> list[Path]:
    """Writes NAME.html, NAME.md and NAME.csv and returns their paths.

    Args:
        page: what to write.
        path: the HTML file.

    Raises:
        UsageError: another kind of file.
        CheckpointError: a file cannot be written.
    """
    check_path(path)
    # All are made before the first is written.
    made = {
        path: html(page),
        path.with_suffix(".md"): markdown(page, path.parent),
        path.with_suffix(".csv"): page_csv(page),
    }
    for file, text in made.items():
        write_atomically(file, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
    return list(made)


def check_path(path: Path) -> None:
    """Refuses what a browser would not open as a page.

    Raises:
        UsageError: the name does not end in .html.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise UsageError(f"the page is an HTML file, {path} does not end in .html: give -o {path.with_suffix('.html')}")
