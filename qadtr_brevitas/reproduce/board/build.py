"""From reports to a board: the lines that are admitted, best first, and those that are refused, with the reasons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from qadtr_brevitas.auditing.standings import Standing, standings
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.evaluation.report import EvaluationReport, Rate
from qadtr_brevitas.evaluation.report.schema import AttackCell, ModelFacts
from qadtr_brevitas.reproduce.board.protocol import (
    Protocol,
    attack_rules,
    counted,
    protocol_of,
    robust_accuracy,
)
from qadtr_brevitas.reproduce.board.rules import Line, refusals
from qadtr_brevitas.reproduce.board.submissions import Submission


@dataclass(frozen=True)
class BoardLine:
    """One model at one precision of one report.

    Args:
        submission: name of the report.
        model: the model.
        standing: what its report says of it.
        robust: what the attacks that count leave together.
        highest: the attack of the highest ASR among them.
        attacks: how many attacks count.
        refused: rule -> why it is refused; empty if it is admitted.
    """

    submission: str
    model: ModelFacts
    standing: Standing
    robust: Rate | None
    highest: tuple[str, AttackCell] | None
    attacks: int
    refused: Mapping[str, str]

    @property
    def order(self) -> tuple[float, float, str, str]:
        """Sorts what resists most first, then what is right most often, then names."""
        robust = self.robust.value if self.robust else None
        return -(robust or 0.0), -(self.standing.clean.value or 0.0), self.submission, self.model.name


@dataclass(frozen=True)
class Board:
    """A board.

    Args:
        protocol: what all lines were measured by.
        admitted: precision -> its lines, best first.
        refused: the lines that are refused.
        unread: reports that cannot be read: name -> why.
        submissions: how many reports were handed in.
    """

    protocol: Protocol
    admitted: Mapping[str, tuple[BoardLine, ...]]
    refused: tuple[BoardLine, ...]
    unread: Mapping[str, str]
    submissions: int


def build_board(submissions: Sequence[Submission]) -> Board:
    """Return the board of reports; the first sets the protocol.

    Args:
        submissions: the reports, at least one.

    Raises:
        UsageError: the first cannot be read, or holds no figures.
    """
    owner = submissions[0]
    if owner.report is None or not owner.report.clean:
        problem = owner.problem or f"{owner.file} holds no figures"
        raise UsageError(f"the first report sets the protocol, and cannot ({problem}): give another as --protocol DIR")
    rules = protocol_of(owner.name, owner.report, standings(owner.report, owner.audits))
    lines = [line for submission in submissions for line in _lines(submission, rules)]
    good = sorted((line for line in lines if not line.refused), key=lambda line: line.order)
    admitted = {p: tuple(line for line in good if line.standing.precision == p) for p in rules.precisions}
    unread = {submission.name: submission.problem for submission in submissions if submission.problem}
    return Board(rules, admitted, tuple(line for line in lines if line.refused), unread, len(submissions))


def _lines(submission: Submission, protocol: Protocol) -> Iterator[BoardLine]:
    report = submission.report
    if report is None:
        return
    models = {model.name: model for model in report.models}
    for standing in standings(report, submission.audits):
        cells = counted(report, standing)
        line = Line(
            standing, report.data, attack_rules(report, standing), eot=any(cell.threat == "eot" for cell in cells)
        )
        yield BoardLine(
            submission=submission.name,
            model=models[standing.model],
            standing=standing,
            robust=robust_accuracy(report, standing),
            highest=_highest(report, cells),
            attacks=len(cells),
            refused=refusals(line, protocol),
        )


def _highest(report: EvaluationReport, cells: Sequence[AttackCell]) -> tuple[str, AttackCell] | None:
    best = max((cell for cell in cells if cell.asr.n), key=lambda cell: cell.asr.value or 0.0, default=None)
    return None if best is None else (report.attack_facts()[best.attack].attack, best)
