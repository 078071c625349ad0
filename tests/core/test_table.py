from __future__ import annotations

from io import StringIO

from rich.console import Console

from qadtr_brevitas.core.table import Table

TABLE = Table(
    "Accuracy",
    ("model", "ASR"),
    (("a|b", 0.5), None, ("two\nlines", None)),
    ("In percent.", "Of 40 images."),
)


def printed(table: object) -> str:
    text = StringIO()
    Console(width=60, file=text).print(table)
    return text.getvalue()


def test_markdown_escapes_bars_and_line_breaks_and_leaves_separators_out() -> None:
    assert TABLE.markdown() == (
        "## Accuracy\n\n| model | ASR |\n| :-- | --: |\n| a\\|b | 0.5 |\n| two lines |  |\n\nIn percent.\nOf 40 images."
    )


def test_csv_has_the_header_and_a_line_per_row() -> None:
    assert TABLE.csv() == 'model,ASR\na|b,0.5\n"two\nlines",\n'


def test_records_keep_numbers_and_missing_values() -> None:
    assert TABLE.records() == [{"model": "a|b", "ASR": 0.5}, {"model": "two\nlines", "ASR": None}]


def test_terminal_shows_title_cells_and_notes_without_markup() -> None:
    text = printed(Table("[title]", ("[name]", "n"), (("[red]", 1),), ("[note]",)).rich())
    for words in ("[title]", "[name]", "[red]", "1", "[note]"):
        assert words in text


def test_columns_have_neither_title_nor_header() -> None:
    text = printed(Table("title", ("name", "description"), (("lavan", "a patch"), ("gap", "another"))).rich_columns())
    assert [line.split() for line in text.splitlines()] == [["lavan", "a", "patch"], ["gap", "another"]]
