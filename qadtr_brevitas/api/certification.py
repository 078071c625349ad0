"""`certify`: the share of images whose prediction no patch of a size can change, from Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qadtr_brevitas.api.inputs import ModelLike, as_loaded, as_split, prepared
from qadtr_brevitas.core.device import resolve_device
from qadtr_brevitas.core.precision import PrecisionLike
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.data.batches import Loader
from qadtr_brevitas.evaluation import Grid
from qadtr_brevitas.evaluation import evaluate as evaluate_grid
from qadtr_brevitas.evaluation.certification import Certification
from qadtr_brevitas.evaluation.masks import MASKS_PER_SIDE
from qadtr_brevitas.evaluation.report import EvaluationReport, Rate


@dataclass(frozen=True)
class CertificationResult:
    """Accuracies of PatchCleanser's double masking by precision.

    Args:
        patch: side of the patch in pixels.
        clean_accuracy: of the undefended prediction.
        defended_accuracy: of the defended prediction on clean images.
        certified_accuracy: images whose defended prediction is right whatever one such patch shows and wherever it is.
        report: the same with everything that is needed to redo it.
    """

    patch: int
    clean_accuracy: dict[str, Rate]
    defended_accuracy: dict[str, Rate]
    certified_accuracy: dict[str, Rate]
    report: EvaluationReport


def certify(
    model: ModelLike,
    loader: Loader,
    *,
    patch: int,
    precisions: Sequence[PrecisionLike] | None = None,
    masks: int = MASKS_PER_SIDE,
    images: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    device: str = "auto",
    progress: Progress | None = None,
) -> CertificationResult:
    """Certify a model against square patches with PatchCleanser (Xiang et al. 2022, double masking).

    Args:
        model: a switchable model, or the folder of one; left as it was.
        loader: labeled test images; pixels in [0, 1] or uint8.
        patch: side of the patch in pixels.
        precisions: precisions to certify; None for all of the model.
        masks: masks along each side of an image; more certify more and take longer, with the fourth power.
        images: at most this many images, drawn class-balanced; None for all.
        seed: of the draw of images.
        batch_size: images in one forward pass.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        progress: called after each part.

    Raises:
        UsageError: the patch does not fit on the images, a precision that the model lacks, or a model that was not
            converted.
        DataError: images or labels do not fit the model.
    """
    where = resolve_device(device)
    loaded = as_loaded(model)
    with prepared([loaded], device=where):
        grid = Grid(
            loaded_models=[loaded],
            patches=[],
            split=as_split(loader, loaded, images=images, seed=seed),
            data_name="loader",
            precisions=precisions,
            certifications=[Certification(patch, masks)],
            seed=seed,
            batch_size=batch_size,
        )
        report = evaluate_grid(grid, output=None, device=where, progress=progress)
    return CertificationResult(
        patch=patch,
        clean_accuracy={cell.precision: cell.accuracy for cell in report.clean},
        defended_accuracy={cell.precision: cell.clean_accuracy for cell in report.certified},
        certified_accuracy={cell.precision: cell.certified_accuracy for cell in report.certified},
        report=report,
    )
