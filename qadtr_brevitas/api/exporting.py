"""`export`: a switchable model at one precision as a file for other tools, from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qadtr_brevitas.api.inputs import ModelLike, PatchLike, as_loaded, as_named_patches, as_split, prepared
from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.patch_size import PatchSizeLike
from qadtr_brevitas.core.precision import Precision, PrecisionLike
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.data.batches import Loader
from qadtr_brevitas.evaluation.certification import Certification, CertifyMethod
from qadtr_brevitas.evaluation.mask_fill import MaskFillKind
from qadtr_brevitas.evaluation.tta import TtaKind
from qadtr_brevitas.exporting import Batch, ExportReport, Format, find_format
from qadtr_brevitas.exporting import export as export_loaded
from qadtr_brevitas.exporting.estimate import missing_compiler
from qadtr_brevitas.pipeline.directories import check_export_output


def export(
    model: ModelLike,
    folder: str | Path,
    *,
    precision: PrecisionLike,
    format: str,
    loader: Loader | None = None,
    patches: Sequence[PatchLike] | Mapping[str, Patch] = (),
    images: int | None = 100,
    batch: Batch = 1,
    baseline: bool = False,
    emulate: bool | None = None,
    defend: PatchSizeLike | None = None,
    masks: int | None = None,
    method: CertifyMethod = "double masking",
    fill: MaskFillKind = "mean",
    tta: TtaKind = "none",
    overlap: int = 1,
    overwrite: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a folder with the model at one precision, and compare the file with the model on images and patches.

    Args:
        model: a switchable model, or the folder of one; left as it was.
        folder: where to write; complete or not at all.
        precision: a precision of the model below 32 bit.
        format: `qonnx`, `qcdq`, `ort`, or a registered format of a compiler that the model was converted for.
        loader: labeled images to compare on; None to leave the file unverified (`agreement` of the report is None).
        patches: patches or patch files whose success is compared, too.
        images: at most this many images, drawn class-balanced; None for all.
        batch: how many images the file takes at once, or "dynamic"; one for compilers of FPGAs.
        baseline: write the float network beside it, as float.onnx.
        emulate: have the FPGA compiler itself execute what it makes of the network; None for where it is installed and
            images are given. `unchecked` of the report says where it did not, and why.
        defend: size of the largest patch to defend against, as 5, "3x10" or (3, 10): masks are written beside the file,
            and `run.py --defend` answers as `qb.defend` does; None for none.
        masks: as for `qb.defend`.
        method: as for `qb.defend`.
        fill: as for `qb.defend`.
        tta: as for `qb.defend`.
        overlap: as for `qb.defend`.
        overwrite: replace an export that is there, and nothing else.
        seed: of places and the draw of images.
        progress: called after each part of the comparison.

    Raises:
        UsageError: the folder is there, an unknown format, a precision that the model lacks, or patches without images.
        ExportError: the format cannot hold the network, or the file computes something else.
    """
    output, form, wanted = Path(folder), find_format(format), Precision.parse(precision)
    check_export_output(output, overwrite=overwrite, option="overwrite=True", choose="")
    if patches and loader is None:
        raise UsageError("patches are compared on images: give loader= with them")
    loaded = as_loaded(model)
    with prepared([loaded], device="cpu"):
        split = None if loader is None else as_split(loader, loaded, images=images, seed=seed)
        named = [(entry.name, entry.patch) for entry in as_named_patches(patches)]
        return export_loaded(
            loaded,
            wanted,
            form,
            output,
            split=split,
            patches=named,
            batch=batch,
            baseline=baseline,
            certification=None if defend is None else Certification(defend, masks, method, fill, tta, overlap),
            emulate=split is not None and _can_emulate(form) if emulate is None else emulate,
            seed=seed,
            command="",
            progress=progress,
        )


def _can_emulate(form: Format) -> bool:
    return form.compiler is not None and not missing_compiler(form.compiler)
