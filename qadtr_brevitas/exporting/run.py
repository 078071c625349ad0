"""One export: freeze, write, verify, and only then keep the folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.core.errors import ExportError, UsageError
from qadtr_brevitas.core.files import replace_directory, write_json
from qadtr_brevitas.core.precision import FLOAT_BITS, Precision
from qadtr_brevitas.core.progress import Progress, silent
from qadtr_brevitas.core.seeding import generator
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation.certification import Certification
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.evaluation.metrics import accuracy
from qadtr_brevitas.evaluation.predict import predict
from qadtr_brevitas.exporting.batch import Batch, as_traced, check_batch, write
from qadtr_brevitas.exporting.build_files import write_build_files
from qadtr_brevitas.exporting.bundle import FLOAT_FILE, Vectors, write_bundle
from qadtr_brevitas.exporting.compiler import BuildTarget
from qadtr_brevitas.exporting.defense import expected_answers, write_defense
from qadtr_brevitas.exporting.estimate import (
    Emulation,
    Estimate,
    compiler_python,
    missing_compiler,
    try_compiler,
)
from qadtr_brevitas.exporting.formats import Format, blockers, check_bits
from qadtr_brevitas.exporting.graph import library
from qadtr_brevitas.exporting.onnx_files import load_onnxruntime, write_float
from qadtr_brevitas.exporting.report import ExportReport
from qadtr_brevitas.exporting.rewrite import PIXELS
from qadtr_brevitas.exporting.rounding import rounded_otherwise
from qadtr_brevitas.exporting.ties import Ties, break_ties, check_ties, count_ties
from qadtr_brevitas.exporting.verify import TOLERANCE, Agreement, check, compare
from qadtr_brevitas.pipeline.directories import EXPORT_REPORT_FILE
from qadtr_brevitas.quant import allowed_precisions, at_precision, freeze, frozen_weights
from qadtr_brevitas.quant.freeze import FrozenModel
from qadtr_brevitas.quant.switchable_quant import has_ranges

# Images that ties are looked for on.
_TRIED = 8
# Images of the test vectors.
_VECTORS = 4
# Of these, how many are answered through masks too, which takes hundreds of forward passes each.
_DEFENDED = 2
_PACKAGES = ("qadtr-brevitas", "brevitas", "torch", "timm", "onnx", "onnxruntime", "qonnx")


def export(
    loaded: LoadedModel,
    precision: Precision,
    form: Format,
    output: Path,
    *,
    split: Split | None,
    patches: Sequence[tuple[str, Patch]] = (),
    tolerance: float = TOLERANCE,
    batch: Batch = 1,
    baseline: bool = False,
    resize: int | None = None,
    build: BuildTarget | None = None,
    with_estimate: bool = False,
    emulate: bool = False,
    certification: Certification | None = None,
    seed: int = 0,
    command: str = "",
    progress: Progress | None = None,
) -> ExportReport:
    """Write a folder with the model file and all that it is deployed with (`exporting.bundle`), or nothing.

    Args:
        loaded: the model, on the CPU.
        precision: an allowed precision below 32 bit.
        form: the format.
        output: the folder; one that was there stays until the new one is complete.
        split: images that the file is verified on; None to leave it unverified.
        patches: names and patches whose success is compared too.
        tolerance: largest difference of the median image's logits, in shares of the largest logit.
        batch: how many images the file takes at once, or "dynamic".
        baseline: write the float network beside it.
        resize: pixels of the shorter side before pictures are cropped to the model's size; None where their size fits.
        build: what to build for, for a format of a compiler.
        with_estimate: have FINN estimate what it costs.
        emulate: have the compiler itself execute what it makes of the network, on one image.
        certification: a defense by masks to write beside the file, for `run.py --defend`; None for none.
        seed: seed of the patches' places.
        command: command line, for the report.
        progress: is told (images done, images in all, what is going on); 0 in all where nothing can be counted.

    Raises:
        UsageError: the precision is not allowed or not below 32 bit, the model was never calibrated or trained, a
            library or the compiler is not installed, the format has no estimates, no such batch, or the patch to defend
            against does not fit on the images.
        ExportError: the format cannot hold the network, the file computes something else, or the compiler refuses it.
        CheckpointError: the folder cannot be written.
    """
    _check(loaded, precision, form, batch, with_estimate=with_estimate, baseline=baseline)
    if certification is not None:
        certification.covering(loaded.info.image_size)
    if emulate:
        _check_emulation(form)
    work = _Export(
        loaded=loaded,
        precision=precision,
        form=form,
        split=split,
        patches=patches,
        tolerance=tolerance,
        batch=batch,
        baseline=baseline,
        resize=resize,
        build=build or BuildTarget(),
        with_estimate=with_estimate,
        emulate=emulate,
        certification=certification,
        seed=seed,
        command=command,
        tell=progress or silent,
    )
    return work.run(output)


@dataclass(frozen=True, kw_only=True)
class _Export:
    """One export, as the arguments of `export` say, which are checked."""

    loaded: LoadedModel
    precision: Precision
    form: Format
    split: Split | None
    patches: Sequence[tuple[str, Patch]]
    tolerance: float
    batch: Batch
    baseline: bool
    resize: int | None
    build: BuildTarget
    with_estimate: bool
    emulate: bool
    certification: Certification | None
    seed: int
    command: str
    tell: Progress

    def run(self, output: Path) -> ExportReport:
        """Write the folder and return what its report says."""
        self.tell(0, 0, "freezing")
        frozen = freeze(self.loaded.model, self.precision)  # pyright: ignore[reportArgumentType]
        written = break_ties(frozen, self._images(_TRIED)) if self._breaks_ties else frozen
        reports: list[ExportReport] = []
        replace_directory(output, lambda folder: reports.append(self._fill(folder, frozen, written)))
        return reports[0]

    @property
    def _breaks_ties(self) -> bool:
        return self.form.compiler is not None and self.form.compiler.rounds_ties_up

    def _fill(self, folder: Path, frozen: FrozenModel, written: FrozenModel) -> ExportReport:
        """Write all files into an empty folder.

        Args:
            folder: the folder.
            frozen: the network at the precision.
            written: the same with its ties broken, where the compiler rounds them otherwise.
        """
        form, file, images = self.form, folder / self.form.file, self._images(_VECTORS)
        self.tell(0, 0, f"writing {form.name}")
        write(form, written, images, self.batch, file)
        agreement, ties = self._verified(file, frozen, written)
        emulation, cost = self._compiled(folder, written, images)
        defense = None
        if self.certification is not None:
            fps = None if cost is None else cost.fps
            defense = write_defense(folder, self.certification, self.loaded, form, fps=fps)
        report = ExportReport(
            model=self.loaded.path or self.loaded.name,
            fingerprint=self.loaded.fingerprint,
            precision=str(self.precision),
            format=form.name,
            batch=self.batch,
            bytes=file.stat().st_size,
            weight_bytes=_weight_bytes(self.loaded.model, self.precision),
            baseline=self._write_baseline(folder, images) if self.baseline else None,
            agreement=agreement,
            ties=ties,
            emulation=emulation,
            unchecked="" if self.emulate else _unchecked(form),
            estimate=cost,
            defense=defense,
            integers=None if form.count_integers is None else form.count_integers(file),
            seed=self.seed,
            command=self.command,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=_versions(),
            files=[],
        )
        self._write_bundle(folder, images, report)
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        report = replace(report, files=files)
        write_json(folder / EXPORT_REPORT_FILE, report.to_dict())
        return report

    def _verified(self, file: Path, frozen: FrozenModel, written: FrozenModel) -> tuple[Agreement | None, Ties | None]:
        """Compare a file with the switchable model, and refuse it where it computes something else."""
        if self.split is None:
            return None, None
        self.tell(0, 0, "loading the file")
        model, form = self.loaded.model, self.form
        with at_precision(model, self.precision), frozen_weights(model):
            agreement = compare(
                model,
                form.load(file),
                self.split,
                self.patches,
                otherwise=lambda: rounded_otherwise(model, seed=self.seed),
                tolerance=self.tolerance,
                as_bytes=form.takes_bytes,
                seed=self.seed,
                progress=self.tell,
            )
        # The file is written with its ties broken, which is more than another order of additions.
        exact = form.exact and not self._breaks_ties
        check(agreement, tolerance=self.tolerance, exact=exact, remedy=form.remedy)
        if not self._breaks_ties:
            return agreement, None
        ties = count_ties(frozen, written, self.split)
        check_ties(ties)
        return agreement, ties

    def _compiled(self, folder: Path, written: FrozenModel, images: Tensor) -> tuple[Emulation | None, Estimate | None]:
        """Write what the compiler builds from, and have it try the network as far as that was asked for."""
        compiler = self.form.compiler
        if compiler is None:
            return None, None
        takes_bytes = self.form.takes_bytes
        write_build_files(folder, compiler, written, as_traced(images, 1), self.build, takes_bytes=takes_bytes)
        if self.emulate or self.with_estimate:
            self.tell(0, 0, f"running {compiler.name}")
        return try_compiler(compiler, folder, emulate=self.emulate, with_estimate=self.with_estimate)

    def _write_baseline(self, folder: Path, images: Tensor) -> float | None:
        """Write the float network beside the exported one, and return its accuracy."""
        self.tell(0, 0, "writing the float network")
        frozen = freeze(self.loaded.model, FLOAT_BITS)  # pyright: ignore[reportArgumentType]
        write_float(frozen, as_traced(images, self.batch), folder / FLOAT_FILE, dynamic=self.batch == "dynamic")
        if self.split is None:
            return None
        classify = load_onnxruntime(folder / FLOAT_FILE)
        return accuracy(predict(classify, self.split), self.split.labels).value

    def _write_bundle(self, folder: Path, images: Tensor, report: ExportReport) -> None:
        """Write the runner, its test vectors and what else a file is deployed with."""
        self.tell(0, 0, "writing what it is deployed with")
        loaded, form = self.loaded, self.form
        with at_precision(loaded.model, self.precision):
            vectors = Vectors(loaded.model, images, self.patches[:1], as_bytes=form.takes_bytes, seed=self.seed)
            if self.certification is not None:
                self.tell(0, 0, "answering through masks")
                few = vectors.images[:_DEFENDED]
                vectors.defended = expected_answers(loaded, self.precision, self.certification, form, few)
            write_bundle(folder, loaded.info, form, report, vectors, resize=self.resize)

    def _images(self, count: int) -> Tensor:
        """Return the first images, (N, C, H, W), or one of noise in whole bytes where there are none."""
        if self.split is not None:
            return self.split.batch(torch.arange(min(count, len(self.split))))[0]
        shape = (1, len(self.loaded.info.mean), *self.loaded.info.image_size)
        return torch.randint(256, shape, generator=generator(0, "export")) / PIXELS


def _check(
    loaded: LoadedModel, precision: Precision, form: Format, batch: Batch, *, with_estimate: bool, baseline: bool
) -> None:
    check_bits(precision, form)
    check_batch(batch, form)
    for package in form.packages:
        library(package)
    if with_estimate:
        if form.compiler is None or not form.compiler.estimates:
            raise UsageError(f"estimates are FINN's, and the format is {form.name}: choose the format of FINN")
        compiler_python(form.compiler)
    with at_precision(loaded.model, precision):
        if found := blockers(loaded.model, form):
            raise ExportError(f"{loaded.name} cannot be exported to {form.name}: {'; '.join(found)}")
    if not has_ranges(loaded.model):
        raise UsageError(
            f"{loaded.name} was never calibrated or trained: every range is still the 1 that convert() sets, and the "
            f"file would compute nonsense. Calibrate it, `qadtr-brevitas convert {loaded.path or 'MODEL'} --calibrate "
            "DATASET`, or qadtr_brevitas.calibrate(model, loader), or train it"
        )
    if baseline and not any(allowed.is_float for allowed in allowed_precisions(loaded.model)):
        raise UsageError(
            f"{loaded.name} has no 32 bit, so there is no float network to compare with: leave out --baseline"
        )


def _weight_bytes(model: Any, precision: Precision) -> int:
    return model.report.sizes[str(precision)]


def _check_emulation(form: Format) -> None:
    if form.compiler is None:
        raise UsageError(f"{form.name} is for no compiler that could execute it: leave out --emulate")
    compiler_python(form.compiler)


def _unchecked(form: Format) -> str:
    """Say that a format's compiler did not check the file, and why; nothing for a format without one."""
    if form.compiler is None:
        return ""
    why = missing_compiler(form.compiler) or "that was not asked for"
    return f"not checked with {form.compiler.name} itself, only as a file: {why}"


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
