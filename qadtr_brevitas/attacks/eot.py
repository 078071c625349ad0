"""Patches under random transforms, for the expectation over them (EOT): drawn anew for every image and step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qadtr_brevitas.attacks.geometry import paste, windows_about
from qadtr_brevitas.attacks.transforms import relight, transform_patch, turning_reach

if TYPE_CHECKING:
    from qadtr_brevitas.attacks.gap import Gap

_ROUNDING = 1e-4


class PutTransformed:
    """Turns, scales, lights and pastes a texture, every image its own way; a `Put`.

    The patch stays whole and inside the image, and is shifted by whole pixels, because that is how it will lie: between
    pixels all fine detail would be lost to interpolation. Only a window of the image that is large enough for every
    turn and scale is worked on.

    Args:
        fields: ranges of the transforms, and the place.
        mask: boolean (h, w), on the device to compute on.
    """

    def __init__(self, fields: Gap, mask: Tensor) -> None:
        self.fields = fields
        self.mask = mask
        self._reach = turning_reach(mask, fields.degrees)

    def __call__(self, texture: Tensor, images: Tensor, generator: torch.Generator) -> Tensor:
        fields, image_size = self.fields, (images.shape[-2], images.shape[-1])
        drawn = torch.rand(len(images), 6, generator=generator, device=generator.device).to(images.device)
        unit = 2 * drawn - 1
        scale = (fields.scale[0] + fields.scale[1] + (fields.scale[1] - fields.scale[0]) * unit[:, 0]) / 2
        degrees = fields.degrees * unit[:, 3]
        window = self._window(image_size)
        middles = self._middles(self._far(degrees, scale), unit[:, 1:3], image_size, generator)
        corners, shift = windows_about(middles, image_size, window)
        textures, masks = transform_patch(texture, self.mask, size=window, degrees=degrees, scale=scale, shift=shift)
        if fields.contrast > 0 or fields.brightness > 0:
            contrast, brightness = 1 + fields.contrast * unit[:, 4], fields.brightness * unit[:, 5]
            textures = relight(textures, contrast=contrast, brightness=brightness)
        return paste(images, textures, masks, corners)

    def _window(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Smallest window (height, width) for all turns and scales about a patch, no larger than the image."""
        sides = [math.ceil(2 * far * self.fields.scale[1] - _ROUNDING) for far in self._reach]
        # Even or odd as the patch is, so that both have their middles on a pixel, or both between two.
        rows, columns = (side + (side - own) % 2 for side, own in zip(sides, self.mask.shape, strict=True))
        return min(rows, image_size[0]), min(columns, image_size[1])

    def _far(self, degrees: Tensor, scale: Tensor) -> Tensor:
        """How far (N, 2) each patch reaches from its middle at most: no farther than its box, turned as it is."""
        height, width = self.mask.shape
        cosine, sine = degrees.deg2rad().cos().abs(), degrees.deg2rad().sin().abs()
        box = torch.stack([height * cosine + width * sine, width * cosine + height * sine], dim=1) / 2
        return scale[:, None] * torch.minimum(box, box.new_tensor(self._reach))

    def _middles(self, far: Tensor, unit: Tensor, image_size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Where the middles (N, 2) of the patches go, given draws (N, 2) between -1 and 1."""
        half, patch = far.new_tensor(image_size) / 2, far.new_tensor(self.mask.shape) / 2
        # A patch that reaches beyond half the image, which only the corners of it can, stays in the middle.
        room = (half - far).clamp(min=0)
        place, keep_out = self.fields.place, self.fields.keep_out
        if place != "random":
            corners = far.new_tensor(place)
        elif keep_out is None:
            first, last = (half - room - patch - _ROUNDING).ceil(), (half + room - patch + _ROUNDING).floor()
            corners = first + ((last - first + 1) * (unit + 1) / 2).floor()
        else:
            # Beside a box, only windows as a whole are known to be free.
            window = self._window(image_size)
            beside = self.fields.corners(len(far), image_size, window, generator=generator).to(far)
            corners = beside + far.new_tensor(window) / 2 - patch
        return (corners + patch).clamp(half - room, half + room)
