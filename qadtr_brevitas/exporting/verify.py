"""Whether an exported file computes what the network computes, on real images and under patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.core.errors import ExportError
from qadtr_brevitas.core.progress import Progress
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation.metrics import accuracy, score
from qadtr_brevitas.evaluation.predict import placements
from qadtr_brevitas.exporting.formats import Classifier
from qadtr_brevitas.exporting.rewrite import PIXELS

# A value that lies between two levels falls to either side by the order of additions. At 8 bit that happens in most
# images and moves outputs by a thousandth of their range; at 2 bit in few, by more. What is really different, such as
# another rounding, moves every image, and was never seen to move it by less than a twentieth: the median image counts.
TOLERANCE = 0.02
_SAME_CLASS = 0.99
_BATCH = 50
_ASR_POINTS = 0.005
_LOOK = "To look at the file all the same, give --no-verify"


@dataclass(frozen=True)
class PatchAgreement:
    """The success of one patch on the network and on the file, as shares of n images."""

    name: str
    target: int | None
    n: int
    asr: float
    exported_asr: float


@dataclass(frozen=True)
class Agreement:
    """How an exported file and the network agree.

    Args:
        images: how many images were compared.
        max_difference: largest absolute difference of two logits.
        median_difference: of the images' largest differences, the median.
        largest_logit: largest absolute logit of the network.
        same_class: share of the images that both put in the same class.
        accuracy: of the network, on these images.
        exported_accuracy: of the file.
        patches: one entry for each patch.
    """

    images: int
    max_difference: float
    median_difference: float
    largest_logit: float
    same_class: float
    accuracy: float
    exported_accuracy: float
    patches: tuple[PatchAgreement, ...]


def compare(
    network: Classifier,
    exported: Classifier,
    split: Split,
    patches: Sequence[tuple[str, Patch]] = (),
    *,
    as_bytes: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Agreement:
    """Run both on the same images, without a patch and with each.

    Args:
        network: the frozen model.
        exported: what executes the file.
        split: the images, all of which are used.
        patches: names and patches; they lie where an evaluation with the same seed puts them.
        as_bytes: round pixels to bytes before either sees them, as where the file takes nothing else.
        seed: seed of the places.
        progress: is told (images done, images in all).
    """
    total = len(split) * (1 + len(patches))
    pair = _Pair(network, exported, split, as_bytes=as_bytes, total=total, progress=progress)
    own, other = pair.logits(None, seed)
    differences = (own - other).abs().amax(1)
    clean, exported_clean = own.argmax(1), other.argmax(1)
    found: list[PatchAgreement] = []
    for name, patch in patches:
        patched, exported_patched = pair.logits(patch, seed)
        target = patch.meta.get("target")
        asr = score(clean, patched.argmax(1), split.labels, target=target).asr
        exported_asr = score(exported_clean, exported_patched.argmax(1), split.labels, target=target).asr
        found.append(PatchAgreement(name, target, asr.n, asr.value or 0.0, exported_asr.value or 0.0))
    return Agreement(
        images=len(split),
        max_difference=float(differences.max()),
        median_difference=float(differences.median()),
        largest_logit=float(own.abs().max()),
        same_class=float((clean == exported_clean).float().mean()),
        accuracy=accuracy(clean, split.labels).value or 0.0,
        exported_accuracy=accuracy(exported_clean, split.labels).value or 0.0,
        patches=tuple(found),
    )


def check(agreement: Agreement, *, tolerance: float = TOLERANCE, remedy: str = "") -> None:
    """Refuses a file that computes something else.

    Args:
        agreement: what was found.
        tolerance: largest difference of the median image's logits, in shares of the largest logit.
        remedy: what to do first of all, a sentence of the error.

    Raises:
        ExportError: a difference larger than rounding explains.
    """
    found = [
        (
            agreement.median_difference > tolerance * agreement.largest_logit,
            f"logits of the median image differ by {agreement.median_difference:.3g}, more than {tolerance:g} of the "
            f"largest, {agreement.largest_logit:.3g}",
        ),
        (
            1 - agreement.same_class > max(1 - _SAME_CLASS, 1.01 / agreement.images),
            f"only {agreement.same_class:.1%} of the images get the same class",
        ),
        *(
            # One image, where there are few, is more than half a point.
            (abs(p.asr - p.exported_asr) > max(_ASR_POINTS, 1.01 / max(p.n, 1)), _asr_words(p))
            for p in agreement.patches
        ),
    ]
    if wrong := [words for is_wrong, words in found if is_wrong]:
        raise ExportError(
            f"the exported file does not compute what the network computes ({'; '.join(wrong)}; {agreement.images} "
            f"images): nothing was kept. {' '.join(filter(None, (remedy, _LOOK)))}"
        )


def _asr_words(patch: PatchAgreement) -> str:
    return f"patch {patch.name} reaches {patch.exported_asr:.1%} instead of {patch.asr:.1%}"


class _Pair:
    """Both classifiers on the same images."""

    def __init__(
        self,
        network: Classifier,
        exported: Classifier,
        split: Split,
        *,
        as_bytes: bool,
        total: int,
        progress: Progress | None,
    ) -> None:
        self.network, self.exported, self.split, self.as_bytes = network, exported, split, as_bytes
        self.done, self.total, self.progress = 0, total, progress

    def logits(self, patch: Patch | None, seed: int) -> tuple[Tensor, Tensor]:
        """Logits (N, classes) of the network and of the file."""
        corners = None if patch is None else placements(patch, len(self.split), self.split.image_size, seed=seed)
        found: list[tuple[Tensor, Tensor]] = []
        for index in torch.arange(len(self.split)).split(_BATCH):
            images, _ = self.split.batch(index)
            if patch is not None and corners is not None:
                images = patch.apply(images, corners=corners[index])
            if self.as_bytes:
                images = (images * PIXELS).round() / PIXELS
            with torch.no_grad():
                found.append((self.network(images), self.exported(images)))
            self.done += len(images)
            if self.progress is not None:
                self.progress(self.done, self.total)
        own, other = zip(*found, strict=True)
        return torch.cat(own), torch.cat(other)
