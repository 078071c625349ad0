"""What figures have to have in common to be compared: the images, and the attacks with their sizes and settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qadtr_brevitas.auditing.standings import Standing, optimized_attacks
from qadtr_brevitas.evaluation.report import EvaluationReport, ImageAttackFacts, PatchFacts
from qadtr_brevitas.evaluation.report.schema import AttackCell, DataFacts, Rate, Scope
from qadtr_brevitas.quant.inference import sorted_modes

_OWN = ("white-box", "eot")


@dataclass(frozen=True, order=True)
class AttackRule:
    """One attack as a protocol asks for it.

    Args:
        attack: its name.
        size: of its patch, or `no patch`.
        target: the class it aims at; -1 for any wrong class.
        made: what it was made on: `itself`, a mean over precisions of itself, or the fingerprint of a given patch.
        settings: its keys, as JSON.
    """

    attack: str
    size: str
    target: int
    made: str
    settings: str

    @property
    def keys(self) -> Mapping[str, Any]:
        """The keys and their values."""
        return dict(json.loads(self.settings))

    @property
    def label(self) -> str:
        """How tables call it."""
        return f"{self.attack}, {self.size}"


@dataclass(frozen=True)
class Protocol:
    """What the lines of one board were measured by.

    Args:
        owner: name of the report that sets it.
        data: the images.
        attacks: name of a precision -> the attacks there.
    """

    owner: str
    data: DataFacts
    attacks: Mapping[str, tuple[AttackRule, ...]]

    @property
    def precisions(self) -> list[str]:
        """The precisions, from many bits to few."""
        return sorted_modes(self.attacks)


def protocol_of(owner: str, report: EvaluationReport, lines: list[Standing]) -> Protocol:
    """Return the protocol that a report was made by; its first model at each precision says by which attacks.

    Args:
        owner: name of the report.
        report: the report.
        lines: what it says of each model at each precision.
    """
    attacks = {line.precision: attack_rules(report, line) for line in reversed(lines)}
    return Protocol(owner, report.data, attacks)


def scope_of(report: EvaluationReport, line: Standing) -> Scope:
    """Return which attacks count: those on the model itself, or all of a model that met others only.

    What was transferred from other models differs from report to report.
    """
    own = any(_is_on(cell, line) and cell.threat in _OWN for cell in optimized_attacks(report))
    return "own" if own else "all"


def robust_accuracy(report: EvaluationReport, line: Standing) -> Rate | None:
    """Return what the attacks that count leave together; None if there were none."""
    scope = scope_of(report, line)
    where = (line.model, line.precision, scope)
    found = (c.robust_accuracy for c in report.worst_case if (c.model, c.precision, c.scope) == where)
    return next(found, None)


def attack_rules(report: EvaluationReport, line: Standing) -> tuple[AttackRule, ...]:
    """Return the attacks that count for one model at one precision, sorted."""
    facts = report.attack_facts()
    return tuple(sorted(_rule(cell, facts[cell.attack]) for cell in counted(report, line)))


def counted(report: EvaluationReport, line: Standing) -> list[AttackCell]:
    """Return the cells of the attacks that count for one model at one precision."""
    scope = scope_of(report, line)
    cells = (cell for cell in optimized_attacks(report) if _is_on(cell, line))
    return [cell for cell in cells if scope == "all" or cell.threat in _OWN]


def _is_on(cell: AttackCell, line: Standing) -> bool:
    return (cell.model, cell.precision) == (line.model, line.precision)


def _rule(cell: AttackCell, facts: PatchFacts | ImageAttackFacts) -> AttackRule:
    # The target has a field of its own.
    settings = {key: value for key, value in facts.settings.items() if key != "target"}
    return AttackRule(
        attack=facts.attack,
        size=_size(facts),
        target=-1 if cell.target is None else cell.target,
        made=_made(cell, facts),
        settings=json.dumps(settings, sort_keys=True),
    )


def _size(facts: PatchFacts | ImageAttackFacts) -> str:
    if isinstance(facts, PatchFacts):
        place = "" if facts.place == "random" else f" at {facts.place[0]},{facts.place[1]}"
        return facts.size + place
    size = facts.settings.get("size")
    return "no patch" if size is None else f"{size}x{size}" if isinstance(size, int) else str(size)


def _made(cell: AttackCell, facts: PatchFacts | ImageAttackFacts) -> str:
    if cell.threat == "white-box":
        return "itself"
    if cell.threat == "eot" and facts.source is not None:
        return f"itself at {facts.source.precision}"
    return facts.fingerprint
