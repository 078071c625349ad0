"""One export: freeze, write, verify, and only then keep the folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.errors import ExportError
from qadtr_brevitas.export.blockers import blockers, check_bits
from qadtr_brevitas.export.formats import MODEL_FILE, Format
from qadtr_brevitas.export.verify import TOLERANCE, Agreement, Progress, check, compare
from qadtr_brevitas.files import replace_directory, write_json
from qadtr_brevitas.precision import Precision
from qadtr_brevitas.quant import at_precision, freeze
from qadtr_brevitas.subjects import Subject

REPORT_FILE = "export-report.json"
_PACKAGES = ("qadtr-brevitas", "brevitas", "torch", "timm", "onnx", "onnxruntime", "qonnx")


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was exported, and how it was checked.

    Args:
        model: name and path of the model directory.
        fingerprint: of its weights.
        precision: the precision exported.
        format: name of the format.
        bytes: size of the model file.
        agreement: how the file and the network agree; None if it was not verified.
        seed: of the patches' places.
        command: command line.
        created: date and time.
        versions: of the packages that had a part in it.
    """

    model: str
    fingerprint: str
    precision: str
    format: str
    bytes: int
    agreement: Agreement | None
    seed: int
    command: str
    created: str
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def export(
    subject: Subject,
    precision: Precision,
    form: Format,
    output: Path,
    *,
    split: Split | None,
    patches: Sequence[tuple[str, Patch]] = (),
    tolerance: float = TOLERANCE,
    seed: int = 0,
    command: str = "",
    progress: Progress | None = None,
) -> ExportReport:
    """Writes a folder with the model file and export-report.json, or nothing.

    Args:
        subject: the model, on the CPU.
        precision: an allowed precision below 32 bit.
        form: the format.
        output: the folder; one that was there stays until the new one is complete.
        split: images that the file is verified on; None to leave it unverified.
        patches: names and patches whose success is compared too.
        tolerance: largest difference of the median image's logits, in shares of the largest logit.
        seed: seed of the patches' places.
        command: command line, for the report.
        progress: is told (images done, images in all).

    Raises:
        UsageError: the precision is not allowed or not below 32 bit, or a library is not installed.
        ExportError: the format cannot hold the network, or the file computes something else.
        CheckpointError: the folder cannot be written.
    """
    check_bits(precision, form)
    with at_precision(subject.model, precision):
        if found := blockers(subject.model, form):
            raise ExportError(f"{subject.name} cannot be exported to {form.name}: {'; '.join(found)}")
    frozen = freeze(subject.model, precision)  # pyright: ignore[reportArgumentType]
    reports: list[ExportReport] = []

    def fill(folder: Path) -> None:
        image = torch.zeros(1, 3, *subject.info.image_size)
        file = folder / MODEL_FILE
        form.write(frozen, image, file)
        agreement = None
        if split is not None:
            agreement = compare(frozen, form.load(file), split, patches, seed=seed, progress=progress)
            check(agreement, tolerance=tolerance)
        report = ExportReport(
            model=subject.path or subject.name,
            fingerprint=subject.fingerprint,
            precision=str(precision),
            format=form.name,
            bytes=file.stat().st_size,
            agreement=agreement,
            seed=seed,
            command=command,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=_versions(),
        )
        write_json(folder / REPORT_FILE, report.to_dict())
        reports.append(report)

    replace_directory(output, fill)
    return reports[0]


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
