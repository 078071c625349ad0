"""What an audit found: one finding for each check, and the report that holds them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from qadtr_brevitas.core.document import Document
from qadtr_brevitas.evaluation.report import Rate

AUDIT_SCHEMA_VERSION = 1

Status: TypeAlias = Literal["pass", "WARN", "skipped"]
STATUSES: tuple[Status, ...] = ("pass", "WARN", "skipped")


@dataclass(frozen=True)
class CheckResult:
    """What a check found.

    Args:
        status: `WARN` where the figures of this model cannot be taken as they are.
        meaning: what was found and what to do, in one sentence.
        numbers: the numbers it was decided on; shares are in [0, 1].
    """

    status: Status
    meaning: str
    numbers: dict[str, float] = field(default_factory=dict[str, float])


def skipped(reason: str) -> CheckResult:
    """Return the result of a check that measured nothing."""
    return CheckResult("skipped", reason)


class Finding(Document):
    """The result of one check, G1 to G22, with its id and title; the other fields are those of `CheckResult`."""

    id: str
    title: str
    status: Status
    numbers: dict[str, float] = {}
    meaning: str


class PrecisionAudit(Document):
    """All findings of one model at one precision.

    Args:
        precision: null for a model that is not switchable.
        clean_accuracy: over the images given; the attacked ones are those classified correctly.
        asr: success rate of the white-box attack, its restarts included, over the attacked images.
        worst_case: images that any attack of the audit broke, over the attacked images.
        side: side of the patch in pixels.
        resolution: smallest difference of two success rates on these images that is more than chance.
        passes: images in forward passes only, and in forward and backward passes.
        findings: one for each check, in order.
    """

    precision: str | None
    clean_accuracy: Rate
    asr: Rate
    worst_case: Rate
    side: int
    resolution: float | None
    passes: dict[str, int]
    findings: tuple[Finding, ...]

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings that need a look."""
        return tuple(finding for finding in self.findings if finding.status == "WARN")

    @property
    def is_incomplete(self) -> bool:
        """Whether most checks measured nothing, so that the absence of warnings says nothing."""
        return 2 * self.count("skipped") > len(self.findings)

    def count(self, status: Status) -> int:
        """Return the number of findings of a status."""
        return sum(finding.status == status for finding in self.findings)


class AuditReport(Document):
    """The audit of one model; `settings` are those of the attacks inside."""

    schema_version: Annotated[int, Field(ge=1)] = AUDIT_SCHEMA_VERSION
    model: str
    fingerprint: str | None
    profile: str
    settings: dict[str, int | str]
    seed: int
    images: int
    precisions: tuple[PrecisionAudit, ...]

    def finding(self, id: str, precision: str | None = None) -> Finding:
        """Return the finding of a check, at one precision or at the first one."""
        audits = [audit for audit in self.precisions if precision is None or audit.precision == precision]
        return next(finding for finding in audits[0].findings if finding.id == id)
