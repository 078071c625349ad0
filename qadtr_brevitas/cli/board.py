"""`qadtr-brevitas board DIR... -o board.html`."""

from __future__ import annotations

from pathlib import Path

import click

from qadtr_brevitas.cli.common import LocalPath, RecordedCommand, command_line, emit, examples, output_options, say
from qadtr_brevitas.cli.start import load_libraries
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.extras import require


@click.command(
    "board",
    cls=RecordedCommand,
    epilog=examples(
        "qadtr-brevitas board alice/evaluation bob/evaluation -o board.html",
        "qadtr-brevitas board submissions --protocol submissions/baseline",
    ),
)
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="DIR...")
@click.option(
    "--protocol",
    type=click.Path(path_type=Path),
    help="Report whose images and attacks all others must have.  [default: the first]",
)
@click.option("--title", default="Who resists patches", show_default=True, help="Title of the page.")
@click.option("--output", "-o", type=LocalPath(), default="board.html", show_default=True, help="HTML file.")
@output_options
def command(folders: tuple[Path, ...], protocol: Path | None, title: str, output: Path) -> None:
    """Rank the models of many reports, of different people, on one page.

    A report is admitted if its audit is complete, if its outputs are not random (or attacked by EOT), if its gradients
    are not zero, and if it has the same images, attacks, patch sizes and precisions as the protocol. The page says of
    every line that is refused by which rule, and why. The same is written as JSON and CSV.
    """
    for folder in (*folders, *([] if protocol is None else [protocol])):
        if not folder.exists():
            raise UsageError(f"there is no folder {folder}: give folders that `evaluate` or `study` wrote")
    require("jinja2", extra="report", purpose="board")
    load_libraries()
    from rich.console import Group

    from qadtr_brevitas.reproduce.board import board_json, board_tables, build_board, read_submissions, write_board
    from qadtr_brevitas.reproduce.page import check_path

    check_path(output)
    # Read together, so that one that is among the folders has one name.
    places = (*([] if protocol is None else [protocol]), *folders)
    board = build_board(read_submissions(places))
    written = write_board(board, output, title=title, command=command_line())
    emit(
        {**board_json(board), "files": [str(path) for path in written]}, Group(*(t.rich() for t in board_tables(board)))
    )
    say(f"wrote {', '.join(map(str, written))}")
    say(f"next: open {output} in a browser")
