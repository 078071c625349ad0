"""One export: freeze, write, verify, and only then keep the folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
from qadtr_brevitas.exporting.estimate import compiler_python, missing_compiler, try_compiler
from qadtr_brevitas.exporting.formats import Format, blockers, check_bits
from qadtr_brevitas.exporting.graph import library
from qadtr_brevitas.exporting.onnx_files import load_onnxruntime, write_float
from qadtr_brevitas.exporting.report import ExportReport
from qadtr_brevitas.exporting.rewrite import PIXELS
from qadtr_brevitas.exporting.rounding import rounded_otherwise
from qadtr_brevitas.exporting.ties import break_ties, check_ties, count_ties
from qadtr_brevitas.exporting.verify import TOLERANCE, Agreement, check, compare
from qadtr_brevitas.pipeline.directories import EXPORT_REPORT_FILE
from qadtr_brevitas.quant import allowed_precisions, at_precision, freeze, frozen_weights
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
    tell = progress or silent
    _check(loaded, precision, form, batch, with_estimate=with_estimate, baseline=baseline)
    if certification is not None:
        certification.covering(loaded.info.image_size)
    if emulate:
        _check_emulation(form)
    tell(0, 0, "freezing")
    frozen = freeze(loaded.model, precision)  # pyright: ignore[reportArgumentType]
    has_ties = form.compiler is not None and form.compiler.rounds_ties_up
    written = break_ties(frozen, _images(loaded, split, _TRIED)) if has_ties else frozen
    reports: list[ExportReport] = []

    def fill(folder: Path) -> None:
        file = folder / form.file
        images = _images(loaded, split, _VECTORS)
        tell(0, 0, f"writing {form.name}")
        write(form, written, images, batch, file)
        agreement = ties = emulation = cost = None
        if split is not None:
            tell(0, 0, "loading the file")
            agreement = _compare(loaded, precision, form, file, split, patches, tolerance, seed, tell)
            if has_ties:
                ties = count_ties(frozen, written, split)
                check_ties(ties)
        if form.compiler is not None:
            image = as_traced(images, 1)
            write_build_files(
                folder, form.compiler, written, image, build or BuildTarget(), takes_bytes=form.takes_bytes
            )
            if emulate or with_estimate:
                tell(0, 0, f"running {form.compiler.name}")
            emulation, cost = try_compiler(form.compiler, folder, emulate=emulate, with_estimate=with_estimate)
        defense = None
        if certification is not None:
            fps = None if cost is None else cost.fps
            defense = write_defense(folder, certification, loaded, form, fps=fps)
        if baseline:
            tell(0, 0, "writing the float network")
        report = ExportReport(
            model=loaded.path or loaded.name,
            fingerprint=loaded.fingerprint,
            precision=str(precision),
            format=form.name,
            batch=batch,
            bytes=file.stat().st_size,
            weight_bytes=_weight_bytes(loaded.model, precision),
            baseline=_write_baseline(loaded, images, batch, folder, split) if baseline else None,
            agreement=agreement,
            ties=ties,
            emulation=emulation,
            unchecked="" if emulate else _unchecked(form),
            estimate=cost,
            defense=defense,
            integers=None if form.count_integers is None else form.count_integers(file),
            seed=seed,
            command=command,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=_versions(),
            files=[],
        )
        tell(0, 0, "writing what it is deployed with")
        with at_precision(loaded.model, precision):
            vectors = Vectors(loaded.model, images, patches[:1], as_bytes=form.takes_bytes, seed=seed)
            if certification is not None:
                tell(0, 0, "answering through masks")
                few = vectors.images[:_DEFENDED]
                vectors.defended = expected_answers(loaded, precision, certification, form, few)
            write_bundle(folder, loaded.info, form, report, vectors, resize=resize)
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        report = replace(report, files=files)
        write_json(folder / EXPORT_REPORT_FILE, report.to_dict())
        reports.append(report)

    replace_directory(output, fill)
    return reports[0]


def _compare(
    loaded: LoadedModel,
    precision: Precision,
    form: Format,
    file: Path,
    split: Split,
    patches: Sequence[tuple[str, Patch]],
    tolerance: float,
    seed: int,
    tell: Progress,
) -> Agreement:
    """Compare a file with the switchable model, and refuse it where it computes something else."""
    model = loaded.model
    # The file is written with its ties broken, which is more than another order of additions.
    exact = form.exact and (form.compiler is None or not form.compiler.rounds_ties_up)
    with at_precision(model, precision), frozen_weights(model):
        agreement = compare(
            model,
            form.load(file),
            split,
            patches,
            otherwise=lambda: rounded_otherwise(model, seed=seed),
            tolerance=tolerance,
            as_bytes=form.takes_bytes,
            seed=seed,
            progress=tell,
        )
    check(agreement, tolerance=tolerance, exact=exact, remedy=form.remedy)
    return agreement


def _write_baseline(
    loaded: LoadedModel, images: Tensor, batch: Batch, folder: Path, split: Split | None
) -> float | None:
    """Write the float network beside the exported one, and return its accuracy."""
    frozen: Any = freeze(loaded.model, FLOAT_BITS)  # pyright: ignore[reportArgumentType]
    write_float(frozen, as_traced(images, batch), folder / FLOAT_FILE, dynamic=batch == "dynamic")
    if split is None:
        return None
    classify = load_onnxruntime(folder / FLOAT_FILE)
    return accuracy(predict(classify, split), split.labels).value


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
