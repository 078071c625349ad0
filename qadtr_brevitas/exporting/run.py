"""One export: freeze, write, verify, and only then keep the folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.core.errors import ExportError, UsageError
from qadtr_brevitas.core.files import replace_directory, write_json
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.core.seeding import generator
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.exporting.build_files import write_build_files
from qadtr_brevitas.exporting.compiler import BuildTarget
from qadtr_brevitas.exporting.estimate import Estimate, compiler_python, estimate
from qadtr_brevitas.exporting.formats import Format, blockers, check_bits
from qadtr_brevitas.exporting.graph import library
from qadtr_brevitas.exporting.integers import IntegerLayers
from qadtr_brevitas.exporting.rewrite import PIXELS
from qadtr_brevitas.exporting.ties import Ties, break_ties, check_ties, count_ties
from qadtr_brevitas.exporting.verify import TOLERANCE, Agreement, check, compare
from qadtr_brevitas.pipeline.directories import EXPORT_REPORT_FILE, ONNX_FILE
from qadtr_brevitas.quant import at_precision, freeze

# Images that ties are looked for on.
_TRIED = 8
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
        ties: what rounding ties up changes, as FINN does; None for other formats, or if it was not verified.
        estimate: what it costs on an FPGA; None if that was not asked for.
        integers: which layers are computed in integers; None for formats that do not tell.
        seed: of the patches' places.
        command: command line.
        created: date and time.
        versions: of the packages that had a part in it.
        files: names of the other files in the folder, which another export may replace.
    """

    model: str
    fingerprint: str
    precision: str
    format: str
    bytes: int
    agreement: Agreement | None
    ties: Ties | None
    estimate: Estimate | None
    integers: IntegerLayers | None
    seed: int
    command: str
    created: str
    versions: Mapping[str, str]
    files: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def export(
    loaded: LoadedModel,
    precision: Precision,
    form: Format,
    output: Path,
    *,
    split: Split | None,
    patches: Sequence[tuple[str, Patch]] = (),
    tolerance: float = TOLERANCE,
    build: BuildTarget | None = None,
    with_estimate: bool = False,
    seed: int = 0,
    command: str = "",
    progress: Progress | None = None,
) -> ExportReport:
    """Write a folder with the model file and export-report.json, or nothing.

    Args:
        loaded: the model, on the CPU.
        precision: an allowed precision below 32 bit.
        form: the format.
        output: the folder; one that was there stays until the new one is complete.
        split: images that the file is verified on; None to leave it unverified.
        patches: names and patches whose success is compared too.
        tolerance: largest difference of the median image's logits, in shares of the largest logit.
        build: what to build for, for a format of a compiler.
        with_estimate: have FINN estimate what it costs.
        seed: seed of the patches' places.
        command: command line, for the report.
        progress: is told (images done, images in all).

    Raises:
        UsageError: the precision is not allowed or not below 32 bit, a library or the compiler is not installed, or
            estimates are asked for in another format than FINN's.
        ExportError: the format cannot hold the network, the file computes something else, or the compiler refuses it.
        CheckpointError: the folder cannot be written.
    """
    _check(loaded, precision, form, with_estimate=with_estimate)
    frozen = freeze(loaded.model, precision)  # pyright: ignore[reportArgumentType]
    has_ties = form.compiler is not None and form.compiler.rounds_ties_up
    written = break_ties(frozen, _images(loaded, split, _TRIED)) if has_ties else frozen
    reports: list[ExportReport] = []

    def fill(folder: Path) -> None:
        image = _images(loaded, split, 1)
        file = folder / ONNX_FILE
        form.write(written, image, file)
        agreement = ties = None
        if split is not None:
            agreement = compare(
                frozen, form.load(file), split, patches, as_bytes=form.takes_bytes, seed=seed, progress=progress
            )
            check(agreement, tolerance=tolerance, remedy=form.remedy)
            if has_ties:
                ties = count_ties(frozen, written, split)
                check_ties(ties)
        if form.compiler is not None:
            write_build_files(
                folder, form.compiler, written, image, build or BuildTarget(), takes_bytes=form.takes_bytes
            )
        report = ExportReport(
            model=loaded.path or loaded.name,
            fingerprint=loaded.fingerprint,
            precision=str(precision),
            format=form.name,
            bytes=file.stat().st_size,
            agreement=agreement,
            ties=ties,
            estimate=estimate(form.compiler, folder) if with_estimate and form.compiler is not None else None,
            integers=None if form.count_integers is None else form.count_integers(file),
            seed=seed,
            command=command,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=_versions(),
            files=sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()),
        )
        write_json(folder / EXPORT_REPORT_FILE, report.to_dict())
        reports.append(report)

    replace_directory(output, fill)
    return reports[0]


def _check(loaded: LoadedModel, precision: Precision, form: Format, *, with_estimate: bool) -> None:
    check_bits(precision, form)
    for package in form.packages:
        library(package)
    if with_estimate:
        if form.compiler is None or not form.compiler.estimates:
            raise UsageError(f"estimates are FINN's, and the format is {form.name}: choose the format of FINN")
        compiler_python(form.compiler)
    with at_precision(loaded.model, precision):
        if found := blockers(loaded.model, form):
            raise ExportError(f"{loaded.name} cannot be exported to {form.name}: {'; '.join(found)}")


def _images(loaded: LoadedModel, split: Split | None, count: int) -> Tensor:
    """Return the first images, (N, C, H, W), or one of noise in whole bytes where there are none."""
    if split is not None:
        return split.batch(torch.arange(min(count, len(split))))[0]
    shape = (1, len(loaded.info.mean), *loaded.info.image_size)
    return torch.randint(256, shape, generator=generator(0, "export")) / PIXELS


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
