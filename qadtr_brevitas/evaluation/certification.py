"""Certification as cells of an evaluation: what a defense by masks predicts, and what it proves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.files import fingerprint_facts, fingerprint_tensors
from qadtr_brevitas.core.patch_size import PatchSize, PatchSizeLike
from qadtr_brevitas.evaluation.cells import CellStore, CertifyKey
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.evaluation.jobs import EvaluationInputs, Victim
from qadtr_brevitas.evaluation.mask_fill import MaskFill, MaskFillKind
from qadtr_brevitas.evaluation.mask_groups import MaskGroups, covering_groups
from qadtr_brevitas.evaluation.masked_predictor import Certified
from qadtr_brevitas.evaluation.masks import MASKS_PER_SIDE, covering_masks, mean_color
from qadtr_brevitas.evaluation.one_round import WINDOWS_PER_SIDE, check_per_side, line_masks, one_round
from qadtr_brevitas.evaluation.patch_cleanser import double_masking
from qadtr_brevitas.evaluation.tta import VIEWS, TtaKind, averaged
from qadtr_brevitas.quant.compiled import repeating

CertifyMethod: TypeAlias = Literal["double masking", "one round"]
"""PatchCleanser's double masking, or one round over masks of which one covers any two places of a patch."""

PORTION = 32
"""Images in one cell: each is looked at hundreds of times, and a stopped evaluation loses no more than these."""


@dataclass(frozen=True)
class Certification:
    """A patch to certify against, and how.

    Args:
        size: its size, as 5 or 3x10.
        masks: masks along each side of an image; None for 6, or 5 in one round, where it has to be a prime.
        method: the certifier.
        fill: what masks show.
        tta: test-time augmentation, the views of a masked image whose logits are averaged.
        overlap: masks along each side over a place of the patch, whose logits are averaged (`mask_groups`); 1 for none.

    Raises:
        UsageError: a size that cannot be read, an unknown method, fill or augmentation, or a number of masks or an
            overlap that the method cannot take.
    """

    size: PatchSize
    masks: int
    method: CertifyMethod
    fill: MaskFillKind
    tta: TtaKind
    overlap: int

    def __init__(
        self,
        size: PatchSizeLike,
        masks: int | None = None,
        method: CertifyMethod = "double masking",
        fill: MaskFillKind = "mean",
        tta: TtaKind = "none",
        overlap: int = 1,
    ) -> None:
        if method not in get_args(CertifyMethod):
            raise UsageError(f"there is no certifier {method!r}: choose from {', '.join(get_args(CertifyMethod))}")
        if fill not in get_args(MaskFillKind):
            raise UsageError(f"masks cannot show {fill!r}: choose fill from {', '.join(get_args(MaskFillKind))}")
        if tta not in get_args(TtaKind):
            known = ", ".join(get_args(TtaKind))
            raise UsageError(f"there is no test-time augmentation {tta!r}: choose tta from {known}")
        object.__setattr__(self, "size", PatchSize.parse(size))
        default = MASKS_PER_SIDE if method == "double masking" else WINDOWS_PER_SIDE
        object.__setattr__(self, "masks", default if masks is None else masks)
        if method == "one round":
            check_per_side(self.masks)
        object.__setattr__(self, "method", method)
        object.__setattr__(self, "fill", fill)
        object.__setattr__(self, "tta", tta)
        if overlap < 1:
            raise UsageError(f"an overlap of {overlap} masks is not possible: give 1 for none, or 2")
        if overlap > 1 and method != "double masking":
            raise UsageError("one round has masks that overlap already: leave overlap out, or take double masking")
        object.__setattr__(self, "overlap", overlap)

    def __str__(self) -> str:
        fill, tta = [] if self.fill == "mean" else [self.fill], [] if self.tta == "none" else [self.tta]
        overlap = [] if self.overlap == 1 else [f"overlap {self.overlap}"]
        return ", ".join([str(self.size), self.method, *fill, *tta, *overlap])

    @property
    def views(self) -> int:
        """Forward passes that a masked image takes."""
        return len(VIEWS[self.tta])

    def covering(self, image_size: tuple[int, int]) -> Tensor:
        """Boolean (M, H, W) masks of which one covers any such patch, or any two places of it.

        Raises:
            UsageError: the patch does not fit on the images.
        """
        if self.overlap > 1:
            return self.groups(image_size).masks
        make = covering_masks if self.method == "double masking" else line_masks
        return make(image_size, self.size, per_side=self.masks)

    def groups(self, image_size: tuple[int, int]) -> MaskGroups:
        """Return the overlapping masks and which of them cover the same places.

        Raises:
            UsageError: the patch does not fit on the images.
        """
        return covering_groups(image_size, self.size, per_side=self.masks, overlap=self.overlap)

    def passes_to_prove(self, image_size: tuple[int, int]) -> int:
        """Return the forward passes that a proved image takes: for each view, its masks and their pairs."""
        count = len(self.covering(image_size))
        if self.method == "one round":
            return self.views * count
        pairs = count * (count - 1) // 2 if self.overlap == 1 else int(self.groups(image_size).pairs.triu(1).sum())
        return self.views * (count + pairs)

    def run(
        self, model: Callable[[Tensor], Tensor], images: Tensor, *, color: Tensor, batch_size: int, prove: bool = True
    ) -> Certified:
        """Return defended predictions of images, and which of them are proved.

        Args:
            model: images (n, C, H, W) in [0, 1] -> logits, the same whenever it is asked; in eval mode.
            images: (N, C, H, W) in [0, 1].
            color: (C, 1, 1), the mean color.
            batch_size: masked images in one forward pass.
            prove: whether to prove predictions; in one round the proof costs nothing.
        """
        size, fill = (images.shape[2], images.shape[3]), MaskFill(color, self.fill)
        seen = averaged(model, self.tta)
        if self.method == "one round":
            found = one_round(seen, images, self.covering(size), self.size, fill=fill, batch_size=batch_size)
        else:
            masks = self.groups(size) if self.overlap > 1 else self.covering(size)
            found = double_masking(seen, images, masks, fill=fill, patch=self.size, batch_size=batch_size, prove=prove)
        assert found.passes is not None
        return replace(found, passes=found.passes * self.views)


@dataclass(frozen=True)
class CertifyJob:
    """The defended predictions of one victim on one chunk of images, and those that are proved.

    Args:
        inputs: the images.
        victim: the model at a precision.
        certification: the patch and the certifier.
        masks: fingerprint of its masks on these images, see `masks_fingerprint`.
        order: int64 (N,), the order in which images are certified, which depends on nothing but them.
        chunk: the images, by their places in the order.
    """

    inputs: EvaluationInputs
    victim: Victim
    certification: Certification
    masks: str
    order: Tensor = field(repr=False, compare=False)
    chunk: range

    def __str__(self) -> str:
        return f"{self.victim}, certify {self.certification}, images {self.chunk.start} to {self.chunk.stop - 1}"

    @property
    def key(self) -> CertifyKey:
        """What its outcomes depend on."""
        return CertifyKey(
            model=self.victim.loaded.fingerprint,
            precision=str(self.victim.precision),
            data=self.inputs.data,
            size=str(self.certification.size),
            method=self.certification.method,
            masks=self.masks,
            start=self.chunk.start,
            stop=self.chunk.stop,
        )

    def loaded_models(self) -> Sequence[LoadedModel]:
        """Return the model."""
        return [self.victim.loaded]

    def is_done(self, store: CellStore) -> bool:
        """Return True where the store has the outcomes."""
        return self.read(store) is not None

    def read(self, store: CellStore) -> Certified | None:
        """Return the outcomes, where they are in the store."""
        found = store.read_chunk(self.key)
        names = ("defended", "proved", "passes")
        return Certified(*(found[name] for name in names)) if found.keys() >= set(names) else None

    def compute(self, store: CellStore, device: torch.device) -> None:
        """Look at the images under all masks and keep the outcomes."""
        images, _ = self.inputs.split.batch(self.order[self.chunk.start : self.chunk.stop], device=device)
        color = mean_color(self.victim.loaded.info.mean)
        # Not inference_mode: Brevitas's quantizers fail on its tensors.
        with torch.no_grad(), repeating(self.victim.loaded.model):
            found = self.certification.run(
                self.victim.logits(self.inputs.seed), images, color=color, batch_size=self.inputs.batch_size
            )
        assert found.passes is not None
        outcomes = {"defended": found.defended, "proved": found.proved, "passes": found.passes}
        store.write_chunk(self.key, outcomes)


def masks_fingerprint(certification: Certification, mean: Sequence[float], image_size: tuple[int, int]) -> str:
    """Return the fingerprint of the masks, of what they show and of the views averaged, which a certificate holds for.

    Args:
        certification: the patch and the certifier.
        mean: the mean color of the model.
        image_size: (H, W) in pixels.
    """
    found = fingerprint_tensors([certification.covering(image_size), mean_color(mean)])
    options = [
        *([] if certification.fill == "mean" else [certification.fill]),
        *([] if certification.tta == "none" else [certification.tta]),
        *([] if certification.overlap == 1 else [f"overlap {certification.overlap}"]),
    ]
    return fingerprint_facts([found, *options]) if options else found
