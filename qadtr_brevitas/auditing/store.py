"""What audits leave in folders: finished precisions, so that an interrupted one can be resumed, and their reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from qadtr_brevitas.auditing.audited_model import AuditedModel, ModelToAudit
from qadtr_brevitas.auditing.finding import AUDIT_SCHEMA_VERSION, AuditReport, PrecisionAudit
from qadtr_brevitas.core.errors import CheckpointError
from qadtr_brevitas.core.files import fingerprint_facts, write_json
from qadtr_brevitas.core.version import __version__
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.evaluation.report import EvaluationReport
from qadtr_brevitas.pipeline.directories import AUDIT_FILE, AUDIT_FOLDER


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
        images = split.fingerprint
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


def read_audits(folder: Path, report: EvaluationReport) -> tuple[AuditReport, ...]:
    """Return the audits of the models of an evaluation, from its folder.

    Raises:
        CheckpointError: the file is damaged.
    """
    file = folder / AUDIT_FILE
    if not file.is_file():
        return ()
    try:
        audits = TypeAdapter(tuple[AuditReport, ...]).validate_json(file.read_bytes())
    except ValidationError as error:
        raise CheckpointError(f"{file} is damaged: run `qadtr-brevitas evaluate --audit` again") from error
    # A later evaluation without --audit keeps the file of an earlier one, perhaps of other weights.
    evaluated = {model.fingerprint for model in report.models}
    return tuple(audit for audit in audits if audit.fingerprint in evaluated)
