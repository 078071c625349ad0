"""Writing a page as HTML, Markdown and CSV.

The HTML file needs nothing else: no scripts, no fonts, no other files. Markdown and CSV hold the same tables.
"""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.files import write_atomically
from qadtr_brevitas.core.table import Cell, Table
from qadtr_brevitas.reproduce.page.blocks import Page, PageBlock

_SUFFIXES = (".html", ".htm")


def write_page(page: Page, path: Path) -> list[Path]:
    """Write NAME.html, NAME.md and NAME.csv, and return their paths.

    Args:
        page: the page.
        path: the HTML file.

    Raises:
        UsageError: the name does not end in .html.
        CheckpointError: a file cannot be written.
    """
    check_path(path)
    # All are rendered before the first is written.
    texts = {
        path: html(page),
        path.with_suffix(".md"): markdown(page, path.parent),
        path.with_suffix(".csv"): page_csv(page),
    }
    for file, text in texts.items():
        write_atomically(file, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
    return list(texts)


def check_path(path: Path) -> None:
    """Raise if a browser would not open a file as a page.

    Raises:
        UsageError: the name does not end in .html.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise UsageError(f"the page is an HTML file, {path} does not end in .html: give -o {path.with_suffix('.html')}")


def html(page: Page) -> str:
    """Return the page as HTML; names and captions are escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters["data_uri"] = _data_uri
    template = files("qadtr_brevitas.reproduce.page").joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(page=page)


def markdown(page: Page, folder: Path) -> str:
    """Return the page as GitHub-flavored Markdown, with links to the pictures of inputs and without curves.

    Args:
        page: the page.
        folder: folder of the file, which links are relative to.
    """
    parts = [f"# {page.title}"]
    for section in page.sections:
        parts.append(f"{'#' * section.level} {section.title}")
        if section.headline is not None:
            parts.append(section.headline.markdown().replace("## ", "#### ", 1))
        parts.append(_facts(section.facts))
        parts += [f"- {remark}" for remark in section.remarks]
        # Each set of warnings stands once, above the first table it concerns.
        shown: set[tuple[str, ...]] = set()
        for block in section.blocks:
            parts += [f"> Audit: {text}" for text in block.warnings if block.warnings not in shown]
            shown.add(block.warnings)
            parts += _markdown_block(block, folder)
    return "\n\n".join([*parts, "## About this page", _facts(page.facts)]) + "\n"


def page_csv(page: Page) -> str:
    """Return every cell of every table as a line of CSV."""
    rows = [
        (section.title, *line)
        for section in page.sections
        for block in section.blocks
        if block.table is not None
        for line in _cells(block.table)
    ]
    return Table(page.title, ("section", "table", "row", "column", "value"), tuple(rows)).csv()


def _cells(table: Table) -> Iterator[tuple[str, str, str, Cell]]:
    """Yield title, row, column and value of every cell."""
    first: Cell = ""
    for row in filter(None, table.rows):
        # A block of rows has its name in the first row only.
        first = row[0] or first
        name = " / ".join(map(str, filter(None, (first, *row[1 : table.labels]))))
        for column, value in zip(table.header[table.labels :], row[table.labels :], strict=True):
            yield table.title, name, column, value


def _markdown_block(block: PageBlock, folder: Path) -> list[str]:
    parts = [block.table.markdown().replace("## ", "#### ", 1)] if block.table else []
    if block.image and block.image.path:
        link = Path(os.path.relpath(block.image.path.resolve(), folder.resolve())).as_posix()
        parts.append(f"![{block.image.caption}]({link.replace(' ', '%20')})")
    return parts


def _facts(facts: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {f'`{text}`' if name == 'command' else text}" for name, text in facts.items())


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{b64encode(png).decode()}"
