"""What an audit says against figures, put where the figures are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qadtr_brevitas.auditing.finding import AuditReport
from qadtr_brevitas.evaluation.report.layout import bits
from qadtr_brevitas.reproduce.page.parts import ReportInput

NO_AUDIT = "No audit was run on {models}: a low ASR may be an attack that failed, which evaluate --audit would tell."


def audit_warnings(parts: Sequence[ReportInput], models: Iterable[str]) -> tuple[str, ...]:
    """One sentence for each check that warns about a model, and one for the models that were not checked.

    Args:
        parts: evaluations, some with audits.
        models: names of the models whose figures are shown.
    """
    # By weights: in a study one model has a name in each evaluation, and is audited once.
    weights = {model.name: model.fingerprint for part in parts for model in part.report.models}
    shown = {name: weights[name] for name in models}
    audits = {audit.fingerprint: audit for part in parts for audit in part.audits}
    names = {fingerprint: name for name, fingerprint in reversed(shown.items())}
    found = [
        sentence
        for fingerprint, name in reversed(names.items())
        if fingerprint in audits
        for sentence in _sentences(name, audits[fingerprint])
    ]
    if missing := [name for name, fingerprint in shown.items() if fingerprint not in audits]:
        found.append(NO_AUDIT.format(models=", ".join(missing)))
    return tuple(found)


def _sentences(name: str, audit: AuditReport) -> list[str]:
    return [
        f"{name}{'' if part.precision is None else f' at {bits(part.precision)}'}: {finding.id} {finding.title}: "
        f"{finding.meaning}"
        for part in audit.precisions
        for finding in part.warnings
    ]
