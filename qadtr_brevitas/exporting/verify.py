"""Whether an exported file computes what the network computes, on real images and under patches.

A value that lies between two levels falls to either side by the order of additions, so that a correct file gives some
images other logits. How many and by how much depends on the network, so it is measured: the network runs once more with
every sum rounded otherwise (`exporting.rounding`). A file is refused if its differences cannot come from rounding:

- it is farther from the network than the network is from itself on more images than nearer (a one-sided sign test);
- images change their class though their margin is larger than what rounding moves;
- a patch succeeds more often on one than on the other (McNemar's test on the images whose outcome differs).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

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

TOLERANCE = 0.02
# Logits of different arithmetic differ by less, in shares of the largest, where no value changes its level.
_SAME = 1e-4
# How often a correct file would be refused by each test.
_SIGN_LEVEL, _PATCH_LEVEL = 1e-3, 1e-2
_UNEXPLAINED = 0.01
_BATCH = 50
_LOOK = "To look at the file all the same, give --no-verify"


@dataclass(frozen=True)
class PatchAgreement:
    """The success of one patch on the network and on the file, as shares of n images.

    Args:
        name: of the patch.
        target: its target class, if it has one.
        n: images that the network classifies correctly, and not as the target, without the patch.
        asr: success on the network.
        exported_asr: success on the file.
        gained: images that it breaks on the file alone.
        lost: images that it breaks on the network alone.
        unexplained: images whose class under the patch differs by more than rounding explains.
    """

    name: str
    target: int | None
    n: int
    asr: float
    exported_asr: float
    gained: int
    lost: int
    unexplained: int


@dataclass(frozen=True)
class Agreement:
    """How an exported file and the network agree.

    Args:
        images: how many images were compared.
        max_difference: largest absolute difference of two logits.
        median_difference: of the images' largest differences, the median.
        largest_logit: largest absolute logit of the network.
        moved: images on which logits differ by more than the last bits of floats.
        own_difference: as `max_difference`, between the network and itself with sums rounded otherwise.
        own_median: as `median_difference`, likewise.
        farther: images on which the file is farther from the network than the network is from itself.
        nearer: images on which it is nearer; on the others both give the same logits but for the last bits.
        same_class: share of the images that both put in the same class.
        unexplained: images whose class differs by more than rounding explains.
        accuracy: of the network, on these images.
        exported_accuracy: of the file.
        patches: one entry for each patch.
    """

    images: int
    max_difference: float
    median_difference: float
    largest_logit: float
    moved: int
    own_difference: float
    own_median: float
    farther: int
    nearer: int
    same_class: float
    unexplained: int
    accuracy: float
    exported_accuracy: float
    patches: tuple[PatchAgreement, ...]

    def sentence(self) -> str:
        """Say in one plain sentence what differs."""
        changed = round((1 - self.same_class) * self.images)
        classes = f"{changed} of {self.images} predictions change" if changed else "no prediction changes"
        if not self.moved:
            return f"The file and PyTorch give the same logits but for the last bits of floats, and {classes}."
        count = "one image" if self.moved == 1 else f"{self.moved} images"
        return (
            f"The largest logit difference is {self.max_difference:.2g} of {self.largest_logit:.3g}, on {count} in "
            f"which a value lies halfway between two levels and falls to the other side; {classes}."
        )


def compare(
    network: Classifier,
    exported: Classifier,
    split: Split,
    patches: Sequence[tuple[str, Patch]] = (),
    *,
    otherwise: Callable[[], AbstractContextManager[None]],
    tolerance: float = TOLERANCE,
    as_bytes: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Agreement:
    """Run both on the same images, without a patch and with each.

    Args:
        network: the switchable model at its precision.
        exported: what executes the file.
        split: the images, all of which are used.
        patches: names and patches; they lie where an evaluation with the same seed puts them.
        otherwise: a context in which the network's sums round otherwise.
        tolerance: shares of the largest logit by which rounding may move any logit.
        as_bytes: round pixels to bytes before either sees them, as where the file takes nothing else.
        seed: seed of the places.
        progress: is told (images done, images in all).
    """
    total = len(split) * (1 + len(patches))
    pair = _Pair(network, exported, split, as_bytes=as_bytes, total=total, progress=progress)
    own, other = pair.logits(None, seed)
    with otherwise():
        own_distance = (pair.network_logits() - own).abs().amax(1)
    distance, largest = (own - other).abs().amax(1), float(own.abs().max())
    last_bits = _SAME * largest
    bound = max(float(own_distance.max()), tolerance * largest)
    clean, exported_clean = own.argmax(1), other.argmax(1)
    found: list[PatchAgreement] = []
    for name, patch in patches:
        logits = pair.logits(patch, seed)
        patched, exported_patched = (one.argmax(1) for one in logits)
        target = patch.meta.get("target")
        asr = score(clean, patched, split.labels, target=target).asr
        exported_asr = score(exported_clean, exported_patched, split.labels, target=target).asr
        success, exported_success = (_broken(after, split.labels, target) for after in (patched, exported_patched))
        counted = (clean == split.labels) & (exported_clean == split.labels)
        counted &= torch.ones_like(counted) if target is None else split.labels != target
        found.append(
            PatchAgreement(
                name=name,
                target=target,
                n=asr.n,
                asr=asr.value or 0.0,
                exported_asr=exported_asr.value or 0.0,
                gained=int((counted & exported_success & ~success).sum()),
                lost=int((counted & success & ~exported_success).sum()),
                unexplained=_unexplained(*logits, bound),
            )
        )
    return Agreement(
        images=len(split),
        max_difference=float(distance.max()),
        median_difference=float(distance.median()),
        largest_logit=largest,
        moved=int((distance > last_bits).sum()),
        own_difference=float(own_distance.max()),
        own_median=float(own_distance.median()),
        farther=int((distance > own_distance.clamp(min=last_bits)).sum()),
        nearer=int((own_distance > distance.clamp(min=last_bits)).sum()),
        same_class=float((clean == exported_clean).float().mean()),
        unexplained=_unexplained(own, other, bound),
        accuracy=accuracy(clean, split.labels).value or 0.0,
        exported_accuracy=accuracy(exported_clean, split.labels).value or 0.0,
        patches=tuple(found),
    )


def _broken(classes: Tensor, labels: Tensor, target: int | None) -> Tensor:
    """Return for which images a patch succeeds, bool (N,)."""
    return classes != labels if target is None else classes == target


def _unexplained(own: Tensor, other: Tensor, bound: float) -> int:
    """Count images whose class differs though two logits would have to move by more than a bound each."""
    chosen = other.argmax(1, keepdim=True)
    margin = own.amax(1) - own.gather(1, chosen)[:, 0]
    return int((margin > 2 * bound).sum())


def check(agreement: Agreement, *, tolerance: float = TOLERANCE, exact: bool = True, remedy: str = "") -> None:
    """Refuses a file that computes something else.

    Args:
        agreement: what was found.
        tolerance: largest difference of the median image's logits, in shares of the largest logit, wherever rounding
            moves the network less than half of that.
        exact: the file should do nothing but round otherwise, so that the sign test applies.
        remedy: what to do first of all, a sentence of the error.

    Raises:
        ExportError: a difference larger than rounding explains.
    """
    if wrong := list(_wrong(agreement, tolerance=tolerance, exact=exact)):
        raise ExportError(
            f"the exported file does not compute what the network computes ({'; '.join(wrong)}; {agreement.images} "
            f"images): nothing was kept. {' '.join(filter(None, (remedy, _LOOK)))}"
        )


def _wrong(agreement: Agreement, *, tolerance: float, exact: bool) -> list[str]:
    images, largest = agreement.images, agreement.largest_logit
    allowed = max(1, int(_UNEXPLAINED * images))
    chance = _chance(agreement.farther, agreement.farther + agreement.nearer, alternative="greater")
    found = [
        (
            exact and chance < _SIGN_LEVEL,
            f"on {agreement.farther} images it is farther from the network than the network is from itself with sums "
            f"rounded otherwise, and nearer on {agreement.nearer}, which chance does once in {_once(chance)}",
        ),
        (
            agreement.median_difference > max(tolerance * largest, 2 * agreement.own_median),
            f"logits of the median image differ by {agreement.median_difference:.3g}, more than {tolerance:g} of the "
            f"largest, {largest:.3g}",
        ),
        (
            agreement.unexplained > allowed,
            f"only {agreement.same_class:.1%} of the images get the same class, and {agreement.unexplained} of the "
            "others by more than rounding explains",
        ),
    ]
    for patch in agreement.patches:
        words = f"patch {patch.name} reaches {patch.exported_asr:.1%} instead of {patch.asr:.1%}"
        p = _chance(patch.gained, patch.gained + patch.lost, alternative="two-sided")
        found += [
            (p < _PATCH_LEVEL / len(agreement.patches), f"{words}, which chance does once in {_once(p)}"),
            (
                patch.unexplained > allowed,
                f"{words}, and {patch.unexplained} images get another class under it by more than rounding explains",
            ),
        ]
    return [words for is_wrong, words in found if is_wrong]


def _once(probability: float) -> str:
    """Return how many times something is tried until it happens once."""
    return f"{1 / max(probability, 1e-99):.2g}"


def _chance(count: int, trials: int, *, alternative: Literal["greater", "two-sided"]) -> float:
    """Return how probable it is that a fair coin falls on one side so often, or more one-sidedly yet."""
    from scipy.stats import binomtest

    return float(binomtest(count, trials, alternative=alternative).pvalue) if trials else 1.0


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
            images = self._images(index)
            if patch is not None and corners is not None:
                images = self._as_taken(patch.apply(images, corners=corners[index]))
            with torch.no_grad():
                found.append((self.network(images), self.exported(images)))
            self.done += len(images)
            if self.progress is not None:
                self.progress(self.done, self.total, "comparing with PyTorch")
        own, other = zip(*found, strict=True)
        return torch.cat(own), torch.cat(other)

    def network_logits(self) -> Tensor:
        """Logits (N, classes) of the network alone."""
        with torch.no_grad():
            return torch.cat([self.network(self._images(i)) for i in torch.arange(len(self.split)).split(_BATCH)])

    def _images(self, index: Tensor) -> Tensor:
        return self._as_taken(self.split.batch(index)[0])

    def _as_taken(self, images: Tensor) -> Tensor:
        return (images * PIXELS).round() / PIXELS if self.as_bytes else images
