from __future__ import annotations

import csv
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qadtr_brevitas.cli.main import cli
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.reproduce.page import build_page, read_inputs, write_page
from qadtr_brevitas.reproduce.page.render import html, markdown, page_csv
from qadtr_brevitas.reproduce.paper import paper_table
from tests.reproduce.page.support import make_audit, make_report, make_whole_study


class PageParser(HTMLParser):
    """Collects what a browser would load or run, and checks that every tag is closed."""

    VOID = ("meta", "img", "link", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script" or any(name.startswith("on") for name, _ in attrs)
        self.sources += [value or "" for name, value in attrs if name in ("src", "srcset")]
        if tag == "link":
            self.sources.append("link")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_whole_study(tmp_path_factory.mktemp("study"))
    make_audit(folder / "b-seen", model="b seen", fingerprint="b seen-weights")
    return folder


@pytest.fixture(scope="module")
def page(study: Path) -> str:
    return html(build_page(read_inputs([study]), title="Results <of> today", command="qadtr-brevitas report x"))


@pytest.mark.slow
def test_the_page_is_well_formed_and_needs_no_other_files(page: str) -> None:
    reader = PageParser()
    reader.feed(page)
    assert reader.open == []
    assert reader.scripts == 0
    assert reader.sources
    assert all(source.startswith("data:image/png;base64,") for source in reader.sources)
    assert "url(" not in page
    assert "Results &lt;of&gt; today" in page


def test_warnings_of_the_audit_stand_above_the_tables_they_concern(page: str) -> None:
    compared = page.index("Table 11 of the paper")
    warning = page.index("b seen at 4 bit: G5 Black box: a black box breaks more: gradients are masked.")
    assert warning < compared
    assert "No audit was run on a seen, a unseen, b unseen" in page[:compared]


def test_every_table_and_picture_shows_how_it_was_made(page: str) -> None:
    tables, pictures = page.count("<h4>"), page.count("<figure>")
    assert page.count("How it was made") >= max(tables, pictures)
    for word in (
        "qadtr-brevitas study table11 scale=smoke",
        "qadtr-brevitas evaluate runs/a",
        "recipes",
        "a recipe",
        "seed",
    ):
        assert word in page


@pytest.mark.slow
def test_the_page_contains_the_recipes_of_runs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_report(run / "evaluation", names=("a", "b"))
    (run / "recipe.yaml").write_text("seed: 0  # <mine>\n")
    file = run / "evaluation" / "report.json"
    file.write_text(file.read_text().replace("runs/a", str(run)))
    page = html(build_page(read_inputs([run / "evaluation"]), title="Results"))
    assert "<h2>Evaluation run</h2>" in page
    assert "Recipe of a</summary><pre>seed: 0  # &lt;mine&gt;" in page
    assert f"a: {run / 'recipe.yaml'} (toy), b: a recipe (toy)" in page


def test_the_page_shows_what_the_paper_leaves_open(page: str) -> None:
    assert paper_table("table11").notes[0] in page


def test_unseen_patches_have_a_section_and_rows_of_their_own(page: str) -> None:
    assert "<h3>Evaluation unseen</h3>" in page
    assert "PBAT, unseen patches" in page


def test_models_of_one_evaluation_stand_in_one_table(page: str) -> None:
    table = page[page.index("<h4>lavan 2x2: clean accuracy and ASR at each precision") :]
    body = table[: table.index("</table>")]
    assert "a seen" in body
    assert "b seen" in body
    assert "unseen" not in body


@pytest.mark.slow
def test_markdown_has_the_same_tables_and_links_pictures_of_folders(study: Path, tmp_path: Path) -> None:
    (study / "a-seen" / "patches.png").write_bytes(b"png")
    text = markdown(build_page(read_inputs([study]), title="Results"), tmp_path)
    (study / "a-seen" / "patches.png").unlink()
    assert "#### Table 11 of the paper" in text
    assert "> Audit: b seen at 4 bit: G5" in text
    (link,) = re.findall(r"!\[The patches\.\]\((.*)\)", text)
    assert (tmp_path / link).resolve() == (study / "a-seen" / "patches.png").resolve()


@pytest.mark.slow
def test_csv_has_every_cell_with_its_row_and_column(study: Path) -> None:
    lines = list(csv.DictReader(StringIO(page_csv(build_page(read_inputs([study]), title="Results")))))
    found = {(line["row"], line["column"]): line["value"] for line in lines if line["table"].startswith("Table 11")}
    assert found["PBAT, seen patches / paper", "8 bit"] == "46.7"
    assert found["PBAT, seen patches / here, white-box", "8 bit"] == "100.0"
    assert found["QADT-R, unseen patches / paper", "2 bit"] == "21.0"


def test_a_file_that_is_not_html_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    result = report(tmp_path, "-o", tmp_path / "report.pdf")
    assert result.exit_code == 2
    assert ".html" in result.stderr
    with pytest.raises(UsageError, match=r"page\.html"):
        write_page(build_page([], title="x"), tmp_path / "page")


def report(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["report", *map(str, arguments)])


@pytest.mark.slow
def test_the_command_writes_three_files_and_names_them(study: Path, tmp_path: Path) -> None:
    result = report(study, study / "a-seen", "-o", tmp_path / "page.html", "--title", "Mine")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.csv", "page.html", "page.md"]
    assert f"next: open {tmp_path / 'page.html'} in a browser" in result.stderr
    assert f"qadtr-brevitas report {study}" in (tmp_path / "page.html").read_text()


def test_a_failure_keeps_the_earlier_page(study: Path, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("earlier")
    assert report(study, tmp_path / "nothing", "-o", tmp_path / "page.html").exit_code == 2
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier"]
