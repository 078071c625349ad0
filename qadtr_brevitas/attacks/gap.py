"""GAP, the adversarial patch: a universal patch that works wherever it lies, turned, scaled and in any light.

The loss is an expectation over transforms (EOT), which are drawn anew for every image and step.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from qadtr_brevitas.attacks.geometry import paste, windows_about
from qadtr_brevitas.attacks.losses import AttackLoss
from qadtr_brevitas.attacks.transforms import relight, transform_patch, turning_reach
from qadtr_brevitas.attacks.universal import ApplyTexture, UniversalPatch
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.plugin import Field, plugin

Factor = Annotated[float, Field(gt=0)]


@plugin
class Gap(UniversalPatch):
    """Universal adversarial patch (Brown et al. 2017): expectation over transformations (EOT), cross-entropy to target.

    In every step every image gets the patch turned, scaled and shifted its own way, whole and inside the image. Colors
    are interpolated, the mask of each is exact. With `target` null the attack is untargeted.

    The budget is that of the patch at scale 1, which is how it is saved. The published notebook scales a patch as large
    as the image by 0.1 to 1 (`size=<side of the image> scale=[0.1,1]`). A patch of a few pixels would vanish at such
    scales; hence 0.9 to 1.1 here. The notebook follows the raw gradient with a constant step: `step_rule=sgd
    cosine=false`.
    """

    attack: ClassVar[str] = "gap"

    shape: Annotated[Literal["square", "rectangle", "disc"], Field(description="what the patch covers")] = "disc"
    loss: Annotated[AttackLoss, Field(description="what is descended")] = "cross-entropy"
    degrees: Annotated[float, Field(ge=0, le=180, description="largest turn in degrees, either way")] = 22.5
    scale: Annotated[tuple[Factor, Factor], Field(description="[smallest, largest] scale")] = (0.9, 1.1)
    contrast: Annotated[float, Field(ge=0, lt=1, description="largest relative change of the contrast")] = 0.0
    brightness: Annotated[float, Field(ge=0, le=1, description="largest change of the brightness, in pixel values")] = (
        0.0
    )

    @model_validator(mode="after")
    def _ordered(self) -> Gap:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale {list(self.scale)} is the wrong way round: give [smallest, largest]")
        return self

    def mask(self, image_size: tuple[int, int]) -> Tensor:
        """Return the pixels the patch covers at scale 1, boolean (h, w), for images of (H, W) pixels.

        Raises:
            UsageError: the patch does not fit on the image at its place and at its largest scale.
        """
        mask = super().mask(image_size)
        if any(side * self.scale[1] > limit for side, limit in zip(mask.shape, image_size, strict=True)):
            raise UsageError(
                f"a {mask.shape[0]}x{mask.shape[1]} patch scaled by up to {self.scale[1]:g} is larger than the "
                f"{image_size[0]}x{image_size[1]} image: give a smaller size, area or scale"
            )
        return mask

    def apply_texture(self, mask: Tensor) -> ApplyTexture:
        """Return the function that transforms a texture for every image and pastes it there."""
        return PasteTransformed(self, mask)


_ROUNDING = 1e-4


class PasteTransformed:
    """Turns, scales, lights and pastes a texture, every image its own way; an `ApplyTexture`.

    The patch stays whole and inside the image, and is shifted by whole pixels, because that is how it will lie: between
    pixels all fine detail would be lost to interpolation. Only a window of the image is computed, which is large
    enough for every turn and scale.

    Args:
        gap: ranges of the transforms, and the place.
        mask: boolean (h, w), on the device to compute on.
    """

    def __init__(self, gap: Gap, mask: Tensor) -> None:
        self.gap = gap
        self.mask = mask
        self._reach = turning_reach(mask, gap.degrees)

    def __call__(self, texture: Tensor, images: Tensor, generator: torch.Generator) -> Tensor:
        gap, image_size = self.gap, (images.shape[-2], images.shape[-1])
        drawn = torch.rand(len(images), 6, generator=generator, device=generator.device).to(images.device)
        unit = 2 * drawn - 1
        scale = (gap.scale[0] + gap.scale[1] + (gap.scale[1] - gap.scale[0]) * unit[:, 0]) / 2
        degrees = gap.degrees * unit[:, 3]
        window = self._window(image_size)
        middles = self._middles(self._half_extents(degrees, scale), unit[:, 1:3], image_size, generator)
        corners, shift = windows_about(middles, image_size, window)
        textures, masks = transform_patch(texture, self.mask, size=window, degrees=degrees, scale=scale, shift=shift)
        if gap.contrast > 0 or gap.brightness > 0:
            contrast, brightness = 1 + gap.contrast * unit[:, 4], gap.brightness * unit[:, 5]
            textures = relight(textures, contrast=contrast, brightness=brightness)
        return paste(images, textures, masks, corners)

    def _window(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Return the smallest window (height, width) for all turns and scales of the patch, at most the image."""
        sides = [math.ceil(2 * reach * self.gap.scale[1] - _ROUNDING) for reach in self._reach]
        # Even or odd as the patch is, so that both have their middles on a pixel, or both between two.
        rows, columns = (side + (side - own) % 2 for side, own in zip(sides, self.mask.shape, strict=True))
        return min(rows, image_size[0]), min(columns, image_size[1])

    def _half_extents(self, degrees: Tensor, scale: Tensor) -> Tensor:
        """Return how far (N, 2) each turned patch reaches from its middle: at most as far as its turned box."""
        height, width = self.mask.shape
        cosine, sine = degrees.deg2rad().cos().abs(), degrees.deg2rad().sin().abs()
        box = torch.stack([height * cosine + width * sine, width * cosine + height * sine], dim=1) / 2
        return scale[:, None] * torch.minimum(box, box.new_tensor(self._reach))

    def _middles(
        self, extents: Tensor, unit: Tensor, image_size: tuple[int, int], generator: torch.Generator
    ) -> Tensor:
        """Return the middles (N, 2) of the patches, given their half extents and draws (N, 2) between -1 and 1."""
        half, patch = extents.new_tensor(image_size) / 2, extents.new_tensor(self.mask.shape) / 2
        # A patch that reaches beyond half the image, which only the corners of it can, stays in the middle.
        room = (half - extents).clamp(min=0)
        first, last = (half - room - patch - _ROUNDING).ceil(), (half + room - patch + _ROUNDING).floor()
        place, keep_out = self.gap.place, self.gap.keep_out
        if place != "random":
            corners = extents.new_tensor(place).clamp(first, last)
        elif keep_out is None:
            corners = first + ((last - first + 1) * (unit + 1) / 2).floor()
        else:
            # Beside a box, only windows as a whole are known to be free.
            window = self._window(image_size)
            beside = self.gap.corners(len(extents), image_size, window, generator=generator).to(extents)
            corners = beside + extents.new_tensor(window) / 2 - patch
        return (corners + patch).clamp(half - room, half + room)
