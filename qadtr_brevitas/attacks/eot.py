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


class PutTransformed:
    """Turns, scales, lights and pastes a texture, every image its own way; a `Put`.

    The patch stays whole and inside the image: its middle is uniform over all points where that holds. Only a window
    of the image that is large enough for every turn and scale is worked on.

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
        """Smallest window (height, width) for all turns and scales, no larger than the image."""
        rows, columns = (math.ceil(2 * far * self.fields.scale[1] - 1e-6) for far in self._reach)
        return min(rows, image_size[0]), min(columns, image_size[1])

    def _far(self, degrees: Tensor, scale: Tensor) -> Tensor:
        """How far (N, 2) each patch reaches from its middle at most: no farther than its box, turned as it is."""
        height, width = self.mask.shape
        cosine, sine = degrees.deg2rad().cos().abs(), degrees.deg2rad().sin().abs()
        box = torch.stack([height * cosine + width * sine, width * cosine + height * sine], dim=1) / 2
        return scale[:, None] * torch.minimum(box, box.new_tensor(self._reach))

    def _middles(self, far: Tensor, unit: Tensor, image_size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Where the middles (N, 2) of the patches go, given draws (N, 2) between -1 and 1."""
        half = far.new_tensor(image_size) / 2
        # A patch that reaches beyond half the image, which only the corners of it can, stays in the middle.
        room = (half - far).clamp(min=0)
        place, keep_out = self.fields.place, self.fields.keep_out
        if place == "random" and keep_out is None:
            return half + room * unit
        # Beside a box, only windows as a whole are known to be free.
        box = (self.mask.shape[0], self.mask.shape[1]) if keep_out is None else self._window(image_size)
        corners = self.fields.corners(len(far), image_size, box, generator=generator).to(far)
        return (corners + far.new_tensor(box) / 2).clamp(half - room, half + room)
