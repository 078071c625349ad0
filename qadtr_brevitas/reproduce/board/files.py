"""The files of a board: HTML for people, JSON and CSV for programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qadtr_brevitas.core.files import write_atomically, write_json
from qadtr_brevitas.core.table import Cell, Table
from qadtr_brevitas.evaluation.report import Rate
from qadtr_brevitas.reproduce.board.build import Board, BoardLine
from qadtr_brevitas.reproduce.board.page import board_page, protocol_facts
from qadtr_brevitas.reproduce.board.rules import RULES
from qadtr_brevitas.reproduce.page.render import check_path, html

_COLUMNS = ("rank", "report", "model", "architecture", "fingerprint", "precision", "attacks")
_RATES = ("clean_accuracy", "robust_accuracy", "highest_asr", "defended_accuracy", "certified_accuracy")


def write_board(board: Board, path: Path, *, title: str, command: str) -> list[Path]:
    """Write NAME.html, NAME.json and NAME.csv, and return their paths.

    Args:
        board: the board.
        path: the HTML file.
        title: title of the page.
        command: the command that makes the board.

    Raises:
        UsageError: the name does not end in .html.
        CheckpointError: a file cannot be written.
    """
    check_path(path)
    text = html(board_page(board, title=title, command=command))
    data, table = board_json(board), board_csv(board)
    json_file, csv_file = path.with_suffix(".json"), path.with_suffix(".csv")
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    write_json(json_file, {**data, "command": command})
    write_atomically(csv_file, lambda temporary: temporary.write_text(table, encoding="utf-8"))
    return [path, json_file, csv_file]


def board_json(board: Board) -> dict[str, Any]:
    """Return the board as JSON values: protocol, rules, lines admitted and refused, and reports not read."""
    return {
        "protocol": protocol_facts(board),
        "rules": {rule.name: rule.asks for rule in RULES},
        "admitted": [_facts(line, rank) for rank, line in _ranked(board)],
        "refused": [{**_facts(line, None), "reasons": dict(line.refused)} for line in board.refused],
        "unread": dict(board.unread),
    }


def board_csv(board: Board) -> str:
    """Return a line for each model and precision; those that are refused have no rank but their reasons."""
    rows = [(*_row(_facts(line, rank)), "") for rank, line in _ranked(board)]
    rows += [(*_row(_facts(line, None)), "; ".join(line.refused.values())) for line in board.refused]
    header = (*_COLUMNS, *(f"{rate}{part}" for rate in _RATES for part in ("", "_low", "_high", "_n")), "refused")
    return Table("Board", header, tuple(rows)).csv()


def _ranked(board: Board) -> list[tuple[int, BoardLine]]:
    return [(rank, line) for lines in board.admitted.values() for rank, line in enumerate(lines, 1)]


def _facts(line: BoardLine, rank: int | None) -> dict[str, Any]:
    standing = line.standing
    rates = {
        "clean_accuracy": standing.clean,
        "robust_accuracy": line.robust,
        "highest_asr": None if line.highest is None else line.highest[1].asr,
        "defended_accuracy": None if standing.certified is None else standing.certified.clean_accuracy,
        "certified_accuracy": None if standing.certified is None else standing.certified.certified_accuracy,
    }
    return {
        "rank": rank,
        "report": line.submission,
        "model": line.model.name,
        "architecture": line.model.architecture,
        "fingerprint": line.model.fingerprint,
        "precision": standing.precision,
        "attacks": line.attacks,
        **{name: None if rate is None else rate.model_dump() for name, rate in rates.items()},
    }


def _row(facts: dict[str, Any]) -> tuple[Cell, ...]:
    rates = [None if facts[name] is None else Rate(**facts[name]) for name in _RATES]
    numbers = [
        cell for rate in rates for cell in ((None,) * 4 if rate is None else (rate.value, rate.low, rate.high, rate.n))
    ]
    return (*(facts[name] for name in _COLUMNS), *numbers)
