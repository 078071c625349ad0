"""The first message of a report: how well each model resists, at which bit-width, at what price, and how sure that is.

Everything else that a report says is detail.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qadtr_brevitas.auditing.finding import AuditReport, PrecisionAudit
from qadtr_brevitas.auditing.standings import Standing, is_guessing, standings
from qadtr_brevitas.auditing.tables import summary
from qadtr_brevitas.core.table import Table
from qadtr_brevitas.evaluation.report import EvaluationReport, Rate
from qadtr_brevitas.evaluation.report.layout import EMPTY, bits, percent, percent_and_range, percent_range

if TYPE_CHECKING:
    from rich.console import RenderableType

# More lines are no longer seen at a glance: each model is then shown at the precision where it resists best.
_MOST_LINES = 12
_NOT_AUDITED = "not audited"
_GUESSES = (
    " Guessing one of {classes} classes could be right as often: what attacks leave of that, or masks prove, is no "
    "resistance."
)
_CERTIFIED_NOTE = (
    "Proved: of the certified images, those that are right under masks whatever a patch shows; defended: those that "
    "are right under masks without a patch. In brackets, 95 % intervals."
)


@dataclass(frozen=True)
class Headline:
    """What a report says, in a few sentences and a small table.

    Args:
        sentences: the sentences.
        table: the figures behind them.
    """

    sentences: tuple[str, ...]
    table: Table

    def rich(self) -> RenderableType:
        """Return the sentences and the table for a rich console."""
        from rich.console import Group
        from rich.text import Text

        return Group(*map(Text, self.sentences), Text(), self.table.rich())

    def markdown(self) -> str:
        """Return the sentences and the table as GitHub-flavored Markdown."""
        return "\n\n".join(["\n".join(self.sentences), self.table.markdown()])


def headline(report: EvaluationReport, audits: Iterable[AuditReport] = ()) -> Headline | None:
    """Return the first message of an evaluation; None for one without any figure.

    Args:
        report: the evaluation.
        audits: audits of its models.
    """
    lines = standings(report, audits)
    if not lines:
        return None
    best = _best(lines, report)
    sentences = [_resists(best, report), _price(best, lines), _trust(lines)]
    return Headline(tuple(filter(None, sentences)), _table(lines, report))


def audit_headline(audit: AuditReport) -> Headline:
    """Return the first message of an audit: what its attacks break, and whether it warns."""
    lines = [
        Standing(audit.model, part.precision or "float", part.clean_accuracy, None, None, None, part)
        for part in audit.precisions
    ]
    weakest = max(audit.precisions, key=lambda part: part.worst_case.value or 0.0)
    where = audit.model if weakest.precision is None else f"{audit.model} at {bits(weakest.precision)}"
    broken = (
        f"{where}{' resists least' if len(lines) > 1 else ''}: of {weakest.worst_case.n} images that it gets right, "
        f"the attacks of the audit break {percent(weakest.worst_case)} %."
    )
    return Headline((broken, _trust(lines)), summary([audit]))


def _best(lines: Sequence[Standing], report: EvaluationReport) -> Standing:
    """Return the line that resists best of those that met most attacks: fewer attacks leave more by themselves.

    A network that guesses is the best only among others that do: whoever says one class always, nothing fools.
    """
    most = max(line.attacks for line in lines)
    attacked = [line for line in lines if line.attacks == most]
    return max(attacked, key=lambda line: (not _guesses(line, report), line.resists))


def _guesses(line: Standing, report: EvaluationReport) -> bool:
    return is_guessing(line.clean, len(report.data.classes))


def _resists(best: Standing, report: EvaluationReport) -> str:
    where = f"{best.model} at {bits(best.precision)}"
    guesses = _guesses(best, report)
    more = _proved(best) + (_GUESSES.format(classes=len(report.data.classes)) if guesses else "")
    n = report.data.images
    if best.robust is None:
        return f"{where} is right on {percent(best.clean)} % of {n} test images; no attack was made.{more}"
    count = best.robust.attacks
    under = "under the attack" if count == 1 else f"under all {count} attacks together"
    kept = best.robust.robust_accuracy
    figures = f"is right on {percent(best.clean)} % of {n} test images, and still on {percent(kept)} % {under}.{more}"
    if len(report.models) == len(report.clean) == 1:
        return f"{where} {figures}"
    # Where nothing is left, or was ever there, the best is no better than the others.
    resists = kept.count and not guesses
    return f"{where} resists best: it {figures}" if resists else f"Nothing resists: {where}, the best, {figures}"


def _proved(best: Standing) -> str:
    if best.certified is None:
        return ""
    cell = best.certified
    proved, defended = cell.certified_accuracy, cell.clean_accuracy
    return (
        f" Proved: on {_percent_of(proved)} of {proved.n} images no patch of {cell.patch} can change the right answer; "
        f"the defended prediction is right on {_percent_of(defended)} of them."
    )


def _percent_of(rate: Rate) -> str:
    return f"{percent(rate)} % ({percent_range((rate.low, rate.high))})"


def _price(best: Standing, lines: Sequence[Standing]) -> str:
    """Return what the best line costs in accuracy beside the most accurate one."""
    top = max(lines, key=lambda line: line.clean.value or 0.0)
    lost = 100 * ((top.clean.value or 0.0) - (best.clean.value or 0.0))
    if len(lines) == 1:
        return ""
    if top is best or round(lost, 1) <= 0:
        return "Price: none here; nothing else is more accurate without an attack."
    return (
        f"Price: {lost:.1f} points of accuracy without an attack, beside {top.model} at {bits(top.precision)} "
        f"({percent(top.clean)} %)."
    )


def _trust(lines: Sequence[Standing]) -> str:
    """Return whether the figures can be taken as they are."""
    attacked = [line for line in lines if line.robust is not None or line.audit is not None]
    if not attacked:
        return ""
    words = {audit_word(line.audit) for line in attacked}
    if words == {_NOT_AUDITED}:
        return "Trust: not audited, so a low success rate may be an attack that failed. Add --audit."
    incomplete = [line for line in attacked if line.audit is not None and line.audit.is_incomplete]
    if incomplete:
        part, where = incomplete[0].audit, f"{incomplete[0].model} at {bits(incomplete[0].precision)}"
        assert part is not None
        skipped, right = part.count("skipped"), part.clean_accuracy
        return (
            f"Trust: AUDIT INCOMPLETE. {skipped} of {len(part.findings)} checks measured nothing: {where} is right on "
            f"{right.count} of the {right.n} audited images. Give more: --audit-images 200."
        )
    warned = [(line, line.audit.warnings) for line in attacked if line.audit is not None and line.audit.warnings]
    if warned:
        line, findings = warned[0]
        more = sum(len(found) for _, found in warned) - 1
        others = f" (and {more} more)" if more else ""
        return (
            f"Trust: not yet. Audit {findings[0].id} of {line.model} at {bits(line.precision)}: "
            f"{findings[0].meaning}{others}"
        )
    if _NOT_AUDITED in words:
        return "Trust: the audit warns of nothing, but not everything was audited."
    return "Trust: the audit warns of nothing."


def audit_word(part: PrecisionAudit | None) -> str:
    """Return what an audit found, in a word or the numbers of its warnings."""
    if part is None:
        return _NOT_AUDITED
    if part.is_incomplete:
        return "incomplete"
    return " ".join(finding.id for finding in part.warnings) or "no warning"


def _table(lines: Sequence[Standing], report: EvaluationReport) -> Table:
    notes = ["In percent of the test images; the highest ASR, of those that are right without the attack."]
    if len(lines) > _MOST_LINES:
        models = dict.fromkeys(line.model for line in lines)
        own = [[line for line in lines if line.model == model] for model in models]
        lines = [_best(found, report) for found in own]
        notes.append("Each model at the bit-width where it resists best.")
    counts = {line.attacks for line in lines}
    if len(counts) > 1:
        notes.append("In brackets, the number of attacks. Fewer leave more: only lines with most of them are compared.")
    facts = report.attack_facts()
    columns: dict[str, list[str]] = {
        "model": [line.model for line in lines],
        "at": [bits(line.precision) for line in lines],
        "right": [percent(line.clean) for line in lines],
        "under attack": [_under_attack(line, counted=len(counts) > 1) for line in lines],
        "highest ASR": [percent(line.highest.asr) if line.highest else EMPTY for line in lines],
        "by": [facts[line.highest.attack].attack if line.highest else EMPTY for line in lines],
        "defended": [percent_and_range(line.certified and line.certified.clean_accuracy) for line in lines],
        "proved": [percent_and_range(line.certified and line.certified.certified_accuracy) for line in lines],
        "audit": [audit_word(line.audit) for line in lines],
    }
    if any(line.certified for line in lines):
        notes.append(_CERTIFIED_NOTE)
    optional = ("under attack", "highest ASR", "by", "defended", "proved")
    shown = {name: cells for name, cells in columns.items() if name not in optional or set(cells) != {EMPTY}}
    if "under attack" not in shown and set(shown["audit"]) == {_NOT_AUDITED}:
        del shown["audit"]
    rows = tuple(zip(*shown.values(), strict=True))
    return Table("In short", tuple(shown), rows, tuple(notes), labels=2)


def _under_attack(line: Standing, *, counted: bool) -> str:
    if line.robust is None:
        return EMPTY
    return percent(line.robust.robust_accuracy) + (f" (of {line.attacks})" if counted else "")
