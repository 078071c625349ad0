"""The keys that patch attacks share: the budget of pixels, the shape and the place."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from qadtr_brevitas.attacks.geometry import corners_outside, fixed_corners, place_corners
from qadtr_brevitas.attacks.shapes import shape_mask, side_for_area
from qadtr_brevitas.core.plugin import Field, plugin

_DEFAULT_AREA = 1 / 16

Pixels = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]


@plugin
class PatchSettings:
    """Budget, shape and place of a patch.

    The budget is a `size` in pixels, or an `area`: the share of the image's pixels that the patch covers. The
    literature calls the area NP, "noise percentage"; it is the NP of the paper's tables. A patch of area 0.08 on a
    32x32 image is the largest shape of at most 0.08 * 32 * 32 = 81 pixels, a square of 9x9.
    """

    size: Annotated[
        Pixels | tuple[Pixels, Pixels] | None,
        Field(description="side or diameter in pixels, or [height, width] of a rectangle"),
    ] = None
    area: Annotated[
        float | None,
        Field(gt=0, le=1, description="budget as a share of the image's pixels (NP); with neither size nor area, 1/16"),
    ] = None
    shape: Annotated[Literal["square", "rectangle", "disc"], Field(description="what the patch covers")] = "square"
    place: Annotated[
        Literal["random"] | tuple[Index, Index],
        Field(description="random, drawn per image and step, or [row, column] of the top left pixel"),
    ] = "random"
    keep_out: Annotated[
        tuple[Index, Index, Pixels, Pixels] | None,
        Field(description="[row, column, height, width] of a box that random places leave free"),
    ] = None

    @model_validator(mode="after")
    def _one_budget(self) -> PatchSettings:
        if self.size is not None and self.area is not None:
            raise ValueError("size and area are two ways to give one budget: give only one of them")
        if self.shape == "rectangle" and not isinstance(self.size, tuple):
            raise ValueError("a rectangle needs size=[height, width]")
        if self.shape != "rectangle" and isinstance(self.size, tuple):
            raise ValueError(f"a {self.shape} needs a single size; for [height, width] give shape=rectangle")
        if self.place != "random" and self.keep_out is not None:
            raise ValueError("keep_out is for random places: give only one of place and keep_out")
        return self

    def mask(self, image_size: tuple[int, int]) -> Tensor:
        """Return the pixels the patch covers, boolean (h, w), for images of (H, W) pixels.

        Raises:
            UsageError: the patch does not fit on the image at its place, or beside the box to keep out of.
        """
        size = self.size
        if size is None:
            size = side_for_area(self.area or _DEFAULT_AREA, image_size, self.shape)
        mask = shape_mask(self.shape, size)
        corner = (0, 0) if self.place == "random" else self.place
        patch_size = mask.shape[0], mask.shape[1]
        fixed_corners(corner, 1, image_size, patch_size)
        if self.keep_out is not None:
            corners_outside(self.keep_out, image_size, patch_size)
        return mask

    def corners(
        self, count: int, image_size: tuple[int, int], patch_size: tuple[int, int], *, generator: torch.Generator
    ) -> Tensor:
        """Return places (count, 2) by these settings, int64 row and column of the top left pixel.

        Random places are drawn with every call.
        """
        return place_corners(self.place, count, image_size, patch_size, generator=generator, keep_out=self.keep_out)
