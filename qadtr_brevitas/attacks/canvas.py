"""Images as a quantized network sees them, and how patches get on them: QADT-R, eq. 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qadtr_brevitas.attacks.fake_quantize import fake_quantize
from qadtr_brevitas.attacks.geometry import paste, random_corners


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """Images of a batch, and what is the same for all patches on them.

    Args:
        images: (N, 3, H, W) in [0, 1].
        background: the same images as they are under the patches, quantized or not.
        mask: boolean (h, w) of the pixels a patch covers.
        bits: bit-width of the patches.
        step_error: relative error of their quantizer's step.
    """

    images: Tensor
    background: Tensor
    mask: Tensor
    bits: int
    step_error: float

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the patches."""
        return self.mask.shape[0], self.mask.shape[1]

    def corners(self, generator: torch.Generator) -> Tensor:
        """A random place (N, 2), row and column in pixels, for each image's patch.

        Raises:
            UsageError: the patches are larger than the images.
        """
        image_size = self.images.shape[-2], self.images.shape[-1]
        return random_corners(len(self.images), image_size, self.size, generator=generator)

    def put(self, patches: Tensor, corners: Tensor) -> Tensor:
        """Images (N, 3, H, W) with the patches (N, 3, h, w), quantized, at corners (N, 2)."""
        return paste(self.background, fake_quantize(patches, self.bits, step_error=self.step_error), self.mask, corners)
