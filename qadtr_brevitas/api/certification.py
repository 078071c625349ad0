"""`certify` and `defend`: predictions that no patch of a size can change, from Python."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from rich.console import Console

from qadtr_brevitas.api.inputs import ModelLike, as_loaded, as_split, prepared
from qadtr_brevitas.auditing.headline import headline
from qadtr_brevitas.core.device import resolve_device
from qadtr_brevitas.core.patch_size import PatchSizeLike
from qadtr_brevitas.core.precision import PrecisionLike
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.data.batches import Loader
from qadtr_brevitas.evaluation import Grid
from qadtr_brevitas.evaluation import evaluate as evaluate_grid
from qadtr_brevitas.evaluation.certification import Certification, CertifyMethod
from qadtr_brevitas.evaluation.defended_classifier import DefendedClassifier
from qadtr_brevitas.evaluation.mask_fill import MaskFillKind
from qadtr_brevitas.evaluation.report import CertifiedCell, EvaluationReport, Rate
from qadtr_brevitas.evaluation.tta import TtaKind
from qadtr_brevitas.quant.compiled import compiling

_WIDTH = 100


@dataclass(frozen=True)
class CertificationResult:
    """Accuracies of a defense by masks, by precision (`4, 5x5` where there are several sizes of patches).

    Args:
        report: the certificates, and everything that is needed to redo them.
    """

    report: EvaluationReport

    @property
    def certificates(self) -> tuple[CertifiedCell, ...]:
        """What is proved, for which patch, precision, weights, masks and images."""
        return self.report.certified

    @property
    def clean_accuracy(self) -> dict[str, Rate]:
        """Accuracy of the undefended prediction, by precision."""
        return {cell.precision: cell.accuracy for cell in self.report.clean}

    @property
    def defended_accuracy(self) -> dict[str, Rate]:
        """Accuracy of the defended prediction on clean images."""
        return {self._key(cell): cell.clean_accuracy for cell in self.report.certified}

    @property
    def certified_accuracy(self) -> dict[str, Rate]:
        """Images whose defended prediction is right whatever one such patch shows and wherever it is."""
        return {self._key(cell): cell.certified_accuracy for cell in self.report.certified}

    def __str__(self) -> str:
        text, first = StringIO(), headline(self.report)
        if first is not None:
            Console(file=text, width=_WIDTH).print(first.rich())
        return text.getvalue()

    def _key(self, cell: CertifiedCell) -> str:
        several = len({other.size for other in self.report.certified}) > 1
        return f"{cell.precision}, {cell.patch}" if several else cell.precision


def certify(
    model: ModelLike,
    loader: Loader,
    *,
    patch: PatchSizeLike | Sequence[PatchSizeLike],
    precisions: Sequence[PrecisionLike] | None = None,
    masks: int | None = None,
    method: CertifyMethod = "double masking",
    fill: MaskFillKind = "mean",
    tta: TtaKind = "none",
    overlap: int = 1,
    images: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    device: str = "auto",
    compile: bool = False,
    cells: str | Path | None = None,
    progress: Progress | None = None,
) -> CertificationResult:
    """Certify a model against rectangular patches (PatchCleanser, Xiang et al. 2022, or in one round).

    Args:
        model: a switchable model, or the folder of one; left as it was.
        loader: labeled test images; pixels in [0, 1] or uint8.
        patch: size of the patch, as 5, "3x10" or the tuple (3, 10); a list for several, each by itself.
        precisions: precisions to certify; None for all of the model.
        masks: masks along each side of an image; more certify more and take longer, with the fourth power. None for 6,
            or 5 in one round, where it has to be a prime number.
        method: `double masking`, or `one round`, of far fewer passes under larger masks (see evaluation/one_round.py).
        fill: what masks show: the `mean` color, or pixels that `interpolate` the visible ones, as in training.
        tta: test-time augmentation, views of a masked image whose logits are averaged: `flip`, its mirror image;
            `shift`, the image moved by one pixel; `flip-shift`. Each view is one pass more, and more is proved.
        overlap: masks along each side over a place of the patch, whose logits are averaged; 1 for one mask by itself. 2
            proves most, for sixteen times the passes (see evaluation/mask_groups.py).
        images: at most this many images, drawn class-balanced; None for all.
        seed: of the draw of images.
        batch_size: images in one forward pass.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        compile: run passes through torch.compile, a wait at first; below 32 bit with convolutions of integers, three
            times as fast on a CPU with VNNI. Logits differ by float rounding.
        cells: folder that keeps finished parts, so that an interrupted certification resumes; None to keep nothing.
        progress: called after each part.

    Raises:
        UsageError: the patch does not fit on the images, a precision that the model lacks, or a model that was not
            converted.
        DataError: images or labels do not fit the model.
    """
    where = resolve_device(device)
    loaded = as_loaded(model)
    sizes = patch if isinstance(patch, list) else [patch]
    with prepared([loaded], device=where), compiling(loaded.model) if compile else nullcontext():
        grid = Grid(
            loaded_models=[loaded],
            patches=[],
            split=as_split(loader, loaded, images=images, seed=seed),
            data_name="loader",
            precisions=precisions,
            certifications=[Certification(size, masks, method, fill, tta, overlap) for size in sizes],  # pyright: ignore[reportArgumentType]
            seed=seed,
            batch_size=batch_size,
        )
        output = None if cells is None else Path(cells)
        return CertificationResult(evaluate_grid(grid, output=output, device=where, progress=progress))


def defend(
    model: ModelLike,
    precision: PrecisionLike,
    *,
    patch: PatchSizeLike,
    masks: int | None = None,
    method: CertifyMethod = "double masking",
    fill: MaskFillKind = "mean",
    tta: TtaKind = "none",
    overlap: int = 1,
    batch_size: int = 256,
) -> DefendedClassifier:
    """Return the defended classifier of a network at one precision.

    Args:
        model: a switchable model, or the folder of one.
        precision: the precision it answers at.
        patch: size of the largest patch to defend against, as 5, "3x10" or (3, 10).
        masks: masks along each side of an image; None for 6, or 5 in one round.
        method: `double masking`, or `one round`.
        fill: what masks show, the `mean` color or pixels that `interpolate` the visible ones.
        tta: test-time augmentation, as for `certify`.
        overlap: masks along each side over a place of the patch, as for `certify`.
        batch_size: masked images in one forward pass.

    Raises:
        UsageError: a precision that the model lacks, a patch that does not fit on its images, or a model that was not
            converted.
    """
    against = Certification(patch, masks, method, fill, tta, overlap)
    return DefendedClassifier(as_loaded(model), precision, against, batch_size=batch_size)
