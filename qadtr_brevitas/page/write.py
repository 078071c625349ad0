"""Writes a page: HTML to read, and the same tables as Markdown and CSV beside it."""

from __future__ import annotations

from pathlib import Path

from qadtr_brevitas.errors import UsageError
from qadtr_brevitas.files import write_atomically
from qadtr_brevitas.page.blocks import Page
from qadtr_brevitas.page.html import html
from qadtr_brevitas.page.text import markdown, page_csv

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
