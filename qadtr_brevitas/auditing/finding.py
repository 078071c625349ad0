"""What an audit found: one finding for each check, and the report that holds them.

How much an audit spends.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from qadtr_brevitas.core.document import Document
from qadtr_brevitas.core.errors import UsageError, suggest
from qadtr_brevitas.evaluation.report import Rate

AUDIT_SCHEMA_VERSION = 1

Status: TypeAlias = Literal["pass", "WARN", "skipped"]


@dataclass(frozen=True)
class Verdict:
    """What a check says.

    Args:
        status: `WARN` where the figures of this model cannot be taken as they are.
        meaning: one plain sentence: what was found and what to do.
        numbers: what it was decided on; shares are in [0, 1].
    """

    status: Status
    meaning: str
    numbers: dict[str, float] = field(default_factory=dict[str, float])


def skipped(reason: str) -> Verdict:
    """The verdict of a check that measured nothing."""
    return Verdict("skipped", reason)


class Finding(Document):
    """The verdict of one check, G1 to G19; the fields are those of `Verdict`."""

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
        asr: of the white-box attack, its restarts included, over the attacked images.
        worst_case: images that any attack of the audit broke, over the attacked images.
        side: side of the patch in pixels.
        resolution: smallest difference of two attacks on these images that counts, as a share of them.
        passes: images that went forward only, and forward and backward.
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
        """The findings to be looked into."""
        return tuple(finding for finding in self.findings if finding.status == "WARN")


class AuditReport(Document):
    """The audit of one model; `settings` are those of the attacks inside."""

    schema_version: Annotated[int, Field(ge=1)] = AUDIT_SCHEMA_VERSION
    model: str
    fingerprint: str | None
    profile: str
    settings: dict[str, Any]
    seed: int
    images: int
    precisions: tuple[PrecisionAudit, ...]

    def finding(self, id: str, precision: str | None = None) -> Finding:
        """The finding of a check, at one precision or at the first one."""
        audits = [audit for audit in self.precisions if precision is None or audit.precision == precision]
        return next(finding for finding in audits[0].findings if finding.id == id)


ProfileName: TypeAlias = Literal["quick", "full"]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The sizes of the attacks inside an audit.

    Args:
        steps: k of the step counts k, 2k and 4k of the longest attack.
        compared_steps: steps of the attacks that are compared with each other.
        restarts: starts of the attack with restarts.
        queries: queries for each image of the attack without gradients.
        noise_patches: patches of noise, over all images together.
        directions: random directions around each start.
        draws: outputs of a random network that are averaged in one step.
    """

    steps: int
    compared_steps: int
    restarts: int
    queries: int
    noise_patches: int
    directions: int
    draws: int


PROFILES: dict[str, Profile] = {
    "quick": Profile(
        steps=15, compared_steps=10, restarts=3, queries=300, noise_patches=10_000, directions=20, draws=5
    ),
    "full": Profile(
        steps=50, compared_steps=50, restarts=5, queries=5_000, noise_patches=50_000, directions=100, draws=20
    ),
}


def find_profile(name: str) -> Profile:
    """The profile of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in PROFILES:
        raise UsageError(f"unknown audit profile {name!r}: {suggest(name, PROFILES)}")
    return PROFILES[name]
