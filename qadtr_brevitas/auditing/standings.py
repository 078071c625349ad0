"""What is known of each model at each precision of a report: accuracy, attacks, certificate and audit side by side."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qadtr_brevitas.auditing.finding import AuditReport, PrecisionAudit
from qadtr_brevitas.evaluation.report import EvaluationReport, Rate
from qadtr_brevitas.evaluation.report.schema import AttackCell, CertifiedCell, WorstCase


@dataclass(frozen=True)
class Standing:
    """What is known of one model at one precision.

    Args:
        model: name of the model.
        precision: name of the precision.
        clean: accuracy without an attack.
        robust: what all attacks together leave, as a share of all images.
        highest: the attack of the highest ASR, a share of the images attacked.
        certified: the certification that proves least.
        audit: its audit.
    """

    model: str
    precision: str
    clean: Rate
    robust: WorstCase | None
    highest: AttackCell | None
    certified: CertifiedCell | None
    audit: PrecisionAudit | None

    @property
    def attacks(self) -> int:
        """How many attacks were made."""
        return self.robust.attacks if self.robust is not None else 0

    @property
    def resists(self) -> float:
        """By how much one line is better than another under as many attacks."""
        if self.robust is not None:
            return self.robust.robust_accuracy.value or 0.0
        if self.certified is not None:
            return self.certified.certified_accuracy.value or 0.0
        return self.clean.value or 0.0


def standings(report: EvaluationReport, audits: Iterable[AuditReport] = ()) -> list[Standing]:
    """Return what a report says of each model at each precision, in its order.

    Args:
        report: the evaluation.
        audits: audits of its models.
    """
    by_weights: dict[str | None, AuditReport] = {audit.fingerprint: audit for audit in audits}
    names = {model.name: model.fingerprint for model in report.models}
    return [
        Standing(
            cell.model,
            cell.precision,
            cell.accuracy,
            # With what was transferred: nobody has to attack a network through itself.
            next((c for c in report.worst_case if _is(c, cell) and c.scope == "all"), None),
            max(
                (c for c in optimized_attacks(report) if _is(c, cell) and c.asr.n),
                key=lambda c: c.asr.value or 0.0,
                default=None,
            ),
            min((c for c in report.certified if _is(c, cell)), key=_certified_share, default=None),
            _audit(by_weights.get(names.get(cell.model)), cell.precision),
        )
        for cell in report.clean
    ]


def is_guessing(accuracy: Rate, classes: int) -> bool:
    """Return whether guessing one of the classes could be right as often: whether the interval reaches down to that."""
    return accuracy.n > 0 and accuracy.low <= 1 / classes


def _is(found: WorstCase | AttackCell | CertifiedCell, cell: object) -> bool:
    return (found.model, found.precision) == (getattr(cell, "model", None), getattr(cell, "precision", None))


def optimized_attacks(report: EvaluationReport) -> list[AttackCell]:
    """Return the cells of attacks: what was moved or turned, and patches of noise, tells nothing of the worst."""
    others = {patch.name for patch in report.patches if patch.control or patch.variant}
    return [cell for cell in report.cells if cell.attack not in others]


def _certified_share(cell: CertifiedCell) -> float:
    return cell.certified_accuracy.value or 0.0


def _audit(audit: AuditReport | None, precision: str) -> PrecisionAudit | None:
    return None if audit is None else next((p for p in audit.precisions if p.precision == precision), None)
