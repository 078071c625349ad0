"""A board as tables and as a page, which is written by what writes reports."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime

from qadtr_brevitas import __version__
from qadtr_brevitas.auditing.headline import Headline, audit_word
from qadtr_brevitas.core.table import Table
from qadtr_brevitas.evaluation.report.layout import EMPTY, bits, percent, percent_and_range, percent_range
from qadtr_brevitas.reproduce.board.build import Board, BoardLine
from qadtr_brevitas.reproduce.board.rules import RULES
from qadtr_brevitas.reproduce.page.blocks import Page, PageBlock, PageSection

_HEADER = (
    "rank",
    "report",
    "model",
    "right",
    "under attack",
    "95 % interval",
    "highest ASR",
    "by",
    "defended",
    "proved",
    "audit",
)
_NOTES = (
    "In percent of the same test images; under attack: right without an attack and under every attack that counts.",
    "Proved: of the certified images, those that are right under masks whatever a patch shows; defended: those that "
    "are right under masks without a patch; both with 95 % intervals.",
    "Lines whose intervals overlap are not told apart by so few images.",
    "Audit: the checks that warn. They refuse nobody, but an attack may break more than these did.",
)


def board_page(board: Board, *, title: str, command: str) -> Page:
    """Return the page of a board.

    Args:
        board: the board.
        title: title of the page.
        command: the command that makes the page.
    """
    facts = protocol_facts(board)
    sections = [
        PageSection("Who resists best", facts, (), headline=Headline(sentences(board), best_table(board))),
        *(
            PageSection(f"At {bits(precision)}", facts, (PageBlock(ranking(board, precision)),))
            for precision, lines in board.admitted.items()
            if lines
        ),
        PageSection("Rules of admission", facts, (PageBlock(rule_table(board)),)),
    ]
    if board.refused or board.unread:
        sections.append(PageSection("Refused", facts, (PageBlock(refused_table(board)),)))
    made = datetime.now(UTC).isoformat(timespec="seconds")
    return Page(title, tuple(sections), {"command": command, "made": made, "version": f"qadtr-brevitas {__version__}"})


def board_tables(board: Board) -> list[Table]:
    """Return the rankings, and the lines that are refused, for a terminal."""
    rankings = [ranking(board, precision) for precision, lines in board.admitted.items() if lines]
    return [*rankings, *([refused_table(board)] if board.refused or board.unread else [])]


def sentences(board: Board) -> tuple[str, ...]:
    """Return what the board says, in two sentences."""
    lines = [line for found in board.admitted.values() for line in found]
    refused = len(board.refused) + len(board.unread)
    counts = (
        f"Of {_count(board.submissions, 'report')}, {_count(len(lines), 'line')} admitted and {refused} refused, with "
        "the reason. A line is one model at one bit-width."
    )
    if not lines:
        return ("Nothing is admitted: see why below.", counts)
    best = min(lines, key=lambda line: line.order)
    assert best.robust is not None
    first = (
        f"{best.model.name} of {best.submission} at {bits(best.standing.precision)} resists best: it is right on "
        f"{percent(best.standing.clean)} % of {board.protocol.data.images} test images, and still on "
        f"{percent(best.robust)} % under {_count(best.attacks, 'attack')}."
    )
    return (first, counts)


def best_table(board: Board) -> Table:
    """Return the first line of each precision."""
    rows = [(bits(precision), *_cells(lines[0])) for precision, lines in board.admitted.items() if lines]
    return Table("First at each bit-width", ("at", *_HEADER[1:]), tuple(rows), labels=3)


def ranking(board: Board, precision: str) -> Table:
    """Return the ranking at one precision."""
    rows = [(str(rank), *_cells(line)) for rank, line in enumerate(board.admitted[precision], 1)]
    return Table(f"Ranking at {bits(precision)}", _HEADER, tuple(rows), _NOTES, labels=3)


def rule_table(board: Board) -> Table:
    """Return what each rule asks, and how many lines it refuses."""
    counts = Counter(name for line in board.refused for name in line.refused)
    rows = tuple((rule.name, rule.asks, str(counts[rule.name])) for rule in RULES)
    notes = ["The protocol:", *(f"{name}: {text}" for name, text in protocol_facts(board).items())]
    return Table("Rules", ("rule", "what it asks", "lines refused"), rows, tuple(notes), labels=2)


def refused_table(board: Board) -> Table:
    """Return every reason for every line that is refused."""
    rows = [
        (line.submission, line.model.name, bits(line.standing.precision), rule, reason)
        for line in board.refused
        for rule, reason in line.refused.items()
    ]
    rows += [(name, EMPTY, EMPTY, "readable", problem) for name, problem in board.unread.items()]
    return Table("Refused", ("report", "model", "at", "rule", "why"), tuple(rows), labels=5)


def protocol_facts(board: Board) -> dict[str, str]:
    """Return the protocol in words."""
    protocol = board.protocol
    attacks = {
        precision: ", ".join(f"{count} x {label}" for label, count in Counter(rule.label for rule in rules).items())
        for precision, rules in protocol.attacks.items()
    }
    return {
        "protocol of": protocol.owner,
        "data": f"{protocol.data.images} {protocol.data.split} images of {protocol.data.name}",
        **{f"attacks at {bits(precision)}": attacks[precision] or "none" for precision in protocol.precisions},
    }


def _count(number: int, name: str) -> str:
    return f"{number} {name}" + ("" if number == 1 else "s")


def _cells(line: BoardLine) -> tuple[str, ...]:
    standing, highest = line.standing, line.highest
    assert line.robust is not None
    certified = standing.certified
    return (
        line.submission,
        line.model.name,
        percent(standing.clean),
        percent(line.robust),
        percent_range((line.robust.low, line.robust.high)),
        EMPTY if highest is None else percent(highest[1].asr),
        EMPTY if highest is None else highest[0],
        percent_and_range(certified and certified.clean_accuracy),
        EMPTY if certified is None else f"{percent_and_range(certified.certified_accuracy)}, {certified.patch}",
        audit_word(standing.audit),
    )
