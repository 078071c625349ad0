"""The warnings of audits, to be shown above the numbers they concern."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qadtr_brevitas.auditing.finding import AuditReport
from qadtr_brevitas.evaluation.report.layout import bits
from qadtr_brevitas.reproduce.page.inputs import ReportInput

_NO_AUDIT = "No audit was run on {models}: a low ASR may mean that the attack failed. Run evaluate --audit to find out."


def audit_warnings(reports: Sequence[ReportInput], models: Iterable[str]) -> tuple[str, ...]:
    """Return a sentence for each check that warns about a model, and one that names the models without an audit.

    Args:
        reports: evaluations, some with audits.
        models: names of the models whose numbers are shown.
    """
    # By weights: in a study, one network has a name in each evaluation and is audited once.
    fingerprints = {model.name: model.fingerprint for report in reports for model in report.report.models}
    shown = {name: fingerprints[name] for name in models}
    audits = {audit.fingerprint: audit for report in reports for audit in report.audits}
    first_names = {fingerprint: name for name, fingerprint in reversed(shown.items())}
    found = [
        sentence
        for fingerprint, name in reversed(first_names.items())
        if fingerprint in audits
        for sentence in _sentences(name, audits[fingerprint])
    ]
    if missing := [name for name, fingerprint in shown.items() if fingerprint not in audits]:
        found.append(_NO_AUDIT.format(models=", ".join(missing)))
    return tuple(found)


def _sentences(name: str, audit: AuditReport) -> list[str]:
    return [
        f"{name}{'' if part.precision is None else f' at {bits(part.precision)}'}: {finding.id} {finding.title}: "
        f"{finding.meaning}"
        for part in audit.precisions
        for finding in part.warnings
    ]
