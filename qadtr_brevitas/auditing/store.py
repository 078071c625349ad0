"""Finished precisions of an audit, kept so that an interrupted audit can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from qadtr_brevitas.auditing.audited_model import AuditedModel, ModelToAudit
from qadtr_brevitas.auditing.finding import AUDIT_SCHEMA_VERSION, PrecisionAudit
from qadtr_brevitas.core.files import fingerprint_facts, fingerprint_tensors, write_json
from qadtr_brevitas.core.version import __version__
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.pipeline.directories import AUDIT_FOLDER


@dataclass(frozen=True)
class AuditStore:
    """A folder of finished precisions, so that an interrupted audit can be resumed.

    Args:
        folder: None to keep nothing.
        facts: everything that the findings depend on but the precision.
    """

    folder: Path | None
    facts: object

    @classmethod
    def of(
        cls,
        folder: Path | None,
        model: ModelToAudit,
        twin: ModelToAudit | None,
        surrogates: Sequence[ModelToAudit],
        ablations: Sequence[ModelToAudit],
        *,
        split: Split,
        settings: object,
    ) -> AuditStore:
        """Return the store of an audit; it keeps nothing for models without a fingerprint, which were not loaded."""
        parts = [model, *([] if twin is None else [twin]), *surrogates, *ablations]
        if folder is None or not all(isinstance(part, LoadedModel) for part in parts):
            return cls(None, None)
        images = fingerprint_tensors([split.images, split.labels])
        groups = [
            [_fingerprint(part) for part in group] for group in ([model], [twin] if twin else [], surrogates, ablations)
        ]
        return cls(folder / AUDIT_FOLDER, [AUDIT_SCHEMA_VERSION, __version__, groups, images, settings])

    def get(self, audited: AuditedModel, compute: Callable[[], PrecisionAudit]) -> PrecisionAudit:
        """Return the finished audit of a precision, or compute and keep it.

        Raises:
            CheckpointError: the file cannot be written.
        """
        if self.folder is None:
            return compute()
        path = self.folder / f"{fingerprint_facts([self.facts, str(audited.precision)])}.json"
        try:
            return PrecisionAudit.model_validate_json(path.read_bytes())
        # A damaged file costs its time again, not the audit.
        except (OSError, ValidationError):
            finished = compute()
        write_json(path, finished.model_dump(mode="json"))
        return finished


def _fingerprint(part: ModelToAudit) -> tuple[str, str]:
    assert isinstance(part, LoadedModel)
    return part.name, part.fingerprint
