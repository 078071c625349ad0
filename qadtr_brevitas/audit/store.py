"""Finished precisions of an audit, kept so that a stopped one goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qadtr_brevitas import __version__
from qadtr_brevitas.audit.finding import AUDIT_SCHEMA_VERSION, PrecisionAudit
from qadtr_brevitas.audit.victim import Audited, Victim
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.files import write_json
from qadtr_brevitas.fingerprints import fingerprint_facts, fingerprint_tensors
from qadtr_brevitas.subjects import Subject

AUDIT_FOLDER = "audit"


@dataclass(frozen=True)
class AuditStore:
    """A folder of finished precisions; without one nothing is kept.

    Args:
        folder: where; None for nowhere.
        facts: all that the findings depend on but the precision.
    """

    folder: Path | None
    facts: Any

    @classmethod
    def of(
        cls,
        folder: Path | None,
        model: Audited,
        twin: Audited | None,
        surrogates: Sequence[Audited],
        ablations: Sequence[Audited],
        *,
        split: Split,
        settings: Any,
    ) -> AuditStore:
        """The store of an audit; models that were not loaded have no fingerprint and are not kept."""
        parts = [model, *([] if twin is None else [twin]), *surrogates, *ablations]
        if folder is None or not all(isinstance(part, Subject) for part in parts):
            return cls(None, None)
        images = fingerprint_tensors([split.images, split.labels])
        groups = [
            [_named(part) for part in group] for group in ([model], [twin] if twin else [], surrogates, ablations)
        ]
        return cls(folder / AUDIT_FOLDER, [AUDIT_SCHEMA_VERSION, __version__, groups, images, settings])

    def get(self, victim: Victim, compute: Callable[[], PrecisionAudit]) -> PrecisionAudit:
        """The finished audit of a precision, or that of `compute`, which is kept.

        Raises:
            CheckpointError: it cannot be written.
        """
        if self.folder is None:
            return compute()
        path = self.folder / f"{fingerprint_facts([self.facts, str(victim.precision)])}.json"
        try:
            return PrecisionAudit.model_validate_json(path.read_bytes())
        # A damaged file costs its time again, not the audit.
        except (OSError, ValidationError):
            found = compute()
        write_json(path, found.model_dump(mode="json"))
        return found


def _named(part: Audited) -> tuple[str, str]:
    assert isinstance(part, Subject)
    return part.name, part.fingerprint
