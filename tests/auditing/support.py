"""Audits that say what a test wants."""

from __future__ import annotations

from collections.abc import Sequence

from qadtr_brevitas.auditing.finding import Finding, PrecisionAudit
from qadtr_brevitas.evaluation.metrics import Proportion
from qadtr_brevitas.evaluation.report import Rate


def precision_audits(precisions: Sequence[str], findings: Sequence[Finding]) -> tuple[PrecisionAudit, ...]:
    """One audit with the findings for each precision."""
    rate = Rate.of(Proportion(3, 10))
    return tuple(
        PrecisionAudit(
            precision=precision,
            clean_accuracy=rate,
            asr=rate,
            worst_case=rate,
            side=2,
            resolution=0.1,
            passes={},
            findings=tuple(findings),
        )
        for precision in precisions
    )
