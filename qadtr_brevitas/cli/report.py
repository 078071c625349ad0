"""`qadtr-brevitas report DIR... -o report.html`."""

from __future__ import annotations

from pathlib import Path

import click

from qadtr_brevitas.cli.common import LocalPath, RecordedCommand, command_line, emit, examples, output_options, say
from qadtr_brevitas.cli.start import load_libraries
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.extras import require


@click.command(
    "report",
    cls=RecordedCommand,
    epilog=examples(
        "qadtr-brevitas report runs/report -o report.html",
        "qadtr-brevitas report studies/table11 studies/table13 --title 'QADT-R on CIFAR-10' -o results.html",
    ),
)
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="DIR...")
@click.option("--title", default="QADT-R: measurements", show_default=True, help="Title of the page.")
@click.option("--output", "-o", type=LocalPath(), default="report.html", show_default=True, help="HTML file.")
@output_options
def command(folders: tuple[Path, ...], title: str, output: Path) -> None:
    """Write evaluations, analyses and studies as one page, beside the values of the paper.

    The page is one file with its pictures inside. The warnings of audits stand above the tables they concern, and every
    number comes with the command, recipe and seed behind it. The same tables are written as Markdown and CSV.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"there is no folder {folder}: give one that `evaluate`, `analyze` or `study` wrote")
    for package in ("jinja2", "matplotlib"):
        require(package, extra="report", purpose="report")
    load_libraries()
    from qadtr_brevitas.reproduce.page import build_page, check_path, read_inputs, write_page

    check_path(output)
    page = build_page(read_inputs(folders), title=title, command=command_line())
    written = write_page(page, output)
    emit({"files": [str(path) for path in written], "sections": [section.title for section in page.sections]})
    say(f"wrote {', '.join(map(str, written))}")
    say(f"next: open {output} in a browser")
