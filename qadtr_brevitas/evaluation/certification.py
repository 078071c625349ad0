"""Certification as cells of an evaluation: what a defense by masks predicts, and what it proves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from qadtr_brevitas.evaluation.cells import CellStore, CertifyKey
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.evaluation.jobs import EvaluationInputs, Victim
from qadtr_brevitas.evaluation.masks import covering_masks, mean_color
from qadtr_brevitas.evaluation.patch_cleanser import Certified, double_masking

PORTION = 32
"""Images in one cell: each is looked at hundreds of times, and a stopped evaluation loses no more than these."""


@dataclass(frozen=True)
class Certification:
    """A patch to certify against.

    Args:
        size: its side in pixels.
        masks: masks along each side of an image.
    """

    size: int
    masks: int

    def covering(self, image_size: tuple[int, int]) -> Tensor:
        """Boolean (M, H, W) masks of which one covers any such patch.

        Raises:
            UsageError: the patch does not fit on the images.
        """
        return covering_masks(image_size, self.size, per_side=self.masks)


@dataclass(frozen=True)
class CertifyJob:
    """The defended predictions of one victim on one chunk of images, and those that are proved."""

    inputs: EvaluationInputs
    victim: Victim
    certification: Certification
    chunk: range

    def __str__(self) -> str:
        size = self.certification.size
        return f"{self.victim}, certify {size}x{size}, images {self.chunk.start} to {self.chunk.stop - 1}"

    @property
    def key(self) -> CertifyKey:
        """What its outcomes depend on."""
        return CertifyKey(
            model=self.victim.loaded.fingerprint,
            precision=str(self.victim.precision),
            data=self.inputs.data,
            start=self.chunk.start,
            stop=self.chunk.stop,
            **asdict(self.certification),
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
        return Certified(found["defended"], found["proved"]) if {"defended", "proved"} <= found.keys() else None

    def compute(self, store: CellStore, device: torch.device) -> None:
        """Look at the images under all masks and keep the outcomes."""
        images, _ = self.inputs.split.batch(torch.tensor(self.chunk), device=device)
        fill = mean_color(self.victim.loaded.info.mean)
        masks = self.certification.covering(self.inputs.split.image_size)
        # Not inference_mode: Brevitas's quantizers fail on its tensors.
        with torch.no_grad():
            found = double_masking(
                self.victim.logits(self.inputs.seed), images, masks, fill=fill, batch_size=self.inputs.batch_size
            )
        store.write_chunk(self.key, {"defended": found.defended, "proved": found.proved})
