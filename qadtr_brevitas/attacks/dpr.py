"""DPR: a universal patch whose shape is searched together with its texture, at the pixel budget of a fixed shape."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from qadtr_brevitas.attacks.descent import OptimizerSteps, Variable, descend
from qadtr_brevitas.attacks.fake_quantize import PATCH_FILE_BITS, fake_quantize
from qadtr_brevitas.attacks.geometry import blend
from qadtr_brevitas.attacks.held_out import as_float
from qadtr_brevitas.attacks.polygon import fit_to_pixels, polygon_mask, soft_polygon_mask
from qadtr_brevitas.attacks.shapes import bounding_box
from qadtr_brevitas.attacks.texture_search import endless_batches, round_checked
from qadtr_brevitas.attacks.universal import ScoredPatch, UniversalPatch, UniversalSearch, search_under_mask
from qadtr_brevitas.core.plugin import Field, plugin

Positive = Annotated[float, Field(gt=0)]

_SHARPNESS_PER_PIXEL = 4.5
"""First sharpness of the border, for each pixel of the patch's radius."""

_LAST_SHARPNESS = 100.0

_START_NOISE = 0.05
"""Standard deviation of the first rays' lengths, relative to their mean."""

_SHORTEST = 0.5
"""Shortest ray, in pixels."""

_ROUNDS = 3
"""How often rays are scaled to the budget and cut to their bounds after a step."""


@plugin
class Dpr(UniversalPatch):
    """Deformable patch (Chen et al., ECCV 2022, "Shape Matters"), universal: a polygon from rays and its texture.

    For the first part of the steps rays and texture are optimized together, under a mask with a soft border that is
    sharpened step by step. Then the mask becomes exact, and only the texture is optimized further. `size`, `area` and
    `shape` give the budget: the exact mask never covers more pixels than that shape, and as a rule just as many.

    What the public code leaves open, and what is done here:

    - An area penalty loses against the attack's loss, so after each step the rays are also scaled to the budget, by the
      number of pixels covered and not by the area.
    - The published sharpness of 100 suits 224x224 pixels; at the radius of a 6x6 patch it moves a third of the rays.
      Default: it starts at 4.5 a pixel of radius and ends at 100.
    - Texture and shape have steps of their own: `lr`, and `ray_lr` for Adam in pixels.
    - The paper makes a patch per image; here it is universal, and placed by the box around its exact mask like any
      other patch.
    """

    attack: ClassVar[str] = "dpr"
    searches_shape: ClassVar[bool] = True

    rays: Annotated[int, Field(ge=3, description="corners of the polygon")] = 36
    ray_lr: Annotated[float, Field(gt=0, description="step of the rays' lengths in pixels")] = 0.1
    shape_share: Annotated[float, Field(gt=0, le=1, description="share of the steps in which the shape changes")] = 0.5
    sharpness: Annotated[
        tuple[Positive, Positive] | None,
        Field(description="[first, last] sharpness of the soft border; null: by the size of the patch"),
    ] = None
    area_weight: Annotated[float, Field(ge=0, description="weight of the area above the budget, in budgets")] = 1.0
    longest: Annotated[float, Field(ge=1, description="longest ray, in radii of a disc of the same area")] = 2.0

    def search(self, search: UniversalSearch, mask: Tensor) -> ScoredPatch:
        """Search shape and texture, then the texture alone, and return the patch with the best held-out score.

        Args:
            search: the restart.
            mask: shape of the same budget; the exact mask of the patch covers at most as many pixels.

        Raises:
            TrainingError: the texture is no longer finite.
        """
        steps = max(1, round(self.steps * self.shape_share))
        shape_search = ShapeSearch(self, search, pixels=int(mask.sum()), steps=steps)
        best, texture, mask = shape_search.run()
        if steps == self.steps:
            return best
        last = search_under_mask(search, mask, start=texture, steps_done=steps)
        return last if last.score >= best.score else best


@dataclass(frozen=True, kw_only=True)
class RayBounds:
    """The limits of the rays.

    Args:
        pixels: most pixels the exact mask may cover.
        longest: (R,) longest each ray may be, in pixels.
        window: (h, w), odd and equal, that holds every shape within these limits.
    """

    pixels: int
    longest: Tensor
    window: tuple[int, int]

    @classmethod
    def of(cls, dpr: Dpr, *, pixels: int, image_size: tuple[int, int], device: torch.device) -> RayBounds:
        """Return the bounds by settings: no ray is much longer than a disc's, and the shape's box fits on the image."""
        reach = (_free_side(dpr, image_size) - 1) // 2 + 0.5
        turns = torch.arange(dpr.rays, device=device) * 2 * math.pi / dpr.rays
        to_box = reach / torch.maximum(turns.cos().abs(), turns.sin().abs())
        longest = to_box.clamp(max=dpr.longest * _radius(pixels))
        side = 2 * min(math.ceil(float(longest.max())), math.ceil(reach)) + 1
        # At a place close to the border the window itself may hold less than the budget.
        return cls(pixels=min(pixels, side**2 - 1), longest=longest, window=(side, side))

    def project(self, rays: Tensor) -> Tensor:
        """Return the rays (R,), cut and scaled to the bounds.

        Cutting rays only takes pixels away, so the budget holds after every round; scaling gives them back elsewhere.
        """
        rays = rays.clamp(min=_SHORTEST)
        for _ in range(_ROUNDS):
            rays = torch.minimum(fit_to_pixels(rays, self.window, pixels=self.pixels), self.longest)
        return rays


class ShapeSearch:
    """The search of rays and texture together.

    Args:
        dpr: the attack's settings.
        search: the restart.
        pixels: most pixels the exact mask may cover.
        steps: how many there will be.
    """

    def __init__(self, dpr: Dpr, search: UniversalSearch, *, pixels: int, steps: int) -> None:
        device = search.images.device
        self._image_size = search.images.shape[-2], search.images.shape[-1]
        self._dpr, self._search, self._steps = dpr, search, steps
        self._bounds = RayBounds.of(dpr, pixels=pixels, image_size=self._image_size, device=device)
        self._sharpness = iter(_sharpness(dpr, pixels, steps))
        self._places = search.stream("shape places")
        self._batches = endless_batches(len(search.images), dpr.batch_size, search.stream("shape batches"))

        noise = 1 + _START_NOISE * torch.randn(dpr.rays, generator=search.stream("shape start")).to(device)
        self._first_rays = self._bounds.project(_radius(pixels) * noise)

    def run(self) -> tuple[ScoredPatch, Tensor, Tensor]:
        """Run the search.

        Returns:
            The best patch by held-out score, with its exact mask; the last texture (C, h, w), not rounded; and the last
            exact mask (h, w).

        Raises:
            TrainingError: the texture is no longer finite.
        """
        dpr, best = self._dpr, None

        def keep_best(step: int, texture: Tensor, rays: Tensor) -> None:
            nonlocal best
            if step % dpr.check_every == 0 or step == self._steps:
                checked = self._scored(texture, rays, step)
                best = checked if best is None or checked.score >= best.score else best
            self._search.report(step, best.score if best else 0.0)

        # The cosine belongs to the texture's own phase: until then the shape it must suit is still changing.
        texture_rule = OptimizerSteps(steps=self._steps, step_rule=dpr.step_rule, lr=dpr.step_size)
        ray_rule = OptimizerSteps(steps=self._steps, step_rule="adam", lr=dpr.ray_lr)
        variables = [
            Variable(self.start_texture(), texture_rule),
            Variable(self._first_rays, ray_rule, self._bounds.project),
        ]
        texture, rays = descend(variables, self._loss, steps=self._steps, after_step=keep_best)
        assert best is not None
        return best, *self._cut(texture, rays)

    def _loss(self, texture: Tensor, rays: Tensor) -> Tensor:
        """Return the loss of a batch under the soft mask, plus the penalty of the area above the budget."""
        index = next(self._batches)
        images, labels = as_float(self._search.images[index]), self._search.labels[index]
        cover = soft_polygon_mask(rays, self._bounds.window, sharpness=next(self._sharpness))
        corners = self._window_corners(rays.detach(), len(images))
        patched = blend(images, fake_quantize(texture, PATCH_FILE_BITS), cover, corners)
        excess = (cover.sum() / self._bounds.pixels - 1).relu()
        return self._search.loss(patched, labels) + self._dpr.area_weight * excess

    def _cut(self, texture: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
        """Cut a texture (C, *window), and the exact mask, to the box around the mask."""
        mask = polygon_mask(rays, self._bounds.window)
        row, column, height, width = bounding_box(mask)
        box = slice(row, row + height), slice(column, column + width)
        return texture[:, *box], mask[box]

    def _scored(self, texture: Tensor, rays: Tensor, step: int) -> ScoredPatch:
        """Return the patch as it would be saved after this step, and its score.

        Raises:
            TrainingError: the texture is no longer finite.
        """
        texture, mask = self._cut(round_checked(texture, step=step), rays)
        score = self._search.score(self._dpr.apply_texture(mask), texture)
        return ScoredPatch(texture=texture, mask=mask, score=score)

    def start_texture(self) -> Tensor:
        """Return a texture (C, h, w) for the window.

        A picture fills the box around the first shape; what rays may reach later continues its border.
        """
        mask, window = polygon_mask(self._first_rays, self._bounds.window), self._bounds.window
        if self._dpr.init != "image":
            return self._search.start_texture(window, self._dpr.apply_texture(torch.ones_like(mask)))
        row, column, height, width = bounding_box(mask)
        box = slice(row, row + height), slice(column, column + width)
        picture = self._search.start_texture((height, width), self._dpr.apply_texture(mask[box]))
        beside = column, window[1] - column - width, row, window[0] - row - height
        return pad(picture[None], beside, mode="replicate")[0]

    def _window_corners(self, rays: Tensor, count: int) -> Tensor:
        """Return corners (count, 2) of the windows, so that the boxes around the exact mask lie as the settings say."""
        row, column, height, width = bounding_box(polygon_mask(rays, self._bounds.window))
        corners = self._dpr.corners(count, self._image_size, (height, width), generator=self._places)
        return corners - corners.new_tensor([row, column])


def _radius(pixels: int) -> float:
    """Return the radius of a disc of so many pixels."""
    return math.sqrt(pixels / math.pi)


def _sharpness(dpr: Dpr, pixels: int, steps: int) -> list[float]:
    """Return the sharpness of the border at each step, growing by the same factor."""
    by_size = min(_SHARPNESS_PER_PIXEL * _radius(pixels), _LAST_SHARPNESS), _LAST_SHARPNESS
    first, last = dpr.sharpness or by_size
    return [first * (last / first) ** (step / max(1, steps - 1)) for step in range(steps)]


def _free_side(dpr: Dpr, image_size: tuple[int, int]) -> int:
    """Return the side of the largest square that fits on the image, at the fixed place or beside the `keep_out` box."""
    if dpr.place != "random":
        return min(side - start for side, start in zip(image_size, dpr.place, strict=True))
    if dpr.keep_out is None:
        return min(image_size)
    row, column, height, width = dpr.keep_out
    beside = max(row, column, image_size[0] - row - height, image_size[1] - column - width)
    return min(beside, *image_size)
