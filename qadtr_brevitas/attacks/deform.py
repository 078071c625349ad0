"""The search of DPR: the rays of a polygon together with its texture, then the texture alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from qadtr_brevitas.attacks.descent import Descent
from qadtr_brevitas.attacks.engine import as_float, endless_batches, round_checked
from qadtr_brevitas.attacks.fake_quantize import PATCH_FILE_BITS, fake_quantize
from qadtr_brevitas.attacks.geometry import blend
from qadtr_brevitas.attacks.polygon import fit_to_pixels, polygon_mask, soft_polygon_mask
from qadtr_brevitas.attacks.shapes import bounding_box
from qadtr_brevitas.attacks.universal import Candidate, Task, search_under_mask

if TYPE_CHECKING:
    from qadtr_brevitas.attacks.dpr import Dpr

_SHARPNESS_PER_PIXEL = 4.5
_LAST_SHARPNESS = 100.0
_START_NOISE = 0.05
_SHORTEST = 0.5
_ROUNDS = 3


def search_shape(fields: Dpr, task: Task, *, pixels: int) -> Candidate:
    """Searches shape and texture, then the texture alone; returns the best by held-out score, with its exact mask.

    Args:
        fields: the attack's settings.
        task: what there is to work with.
        pixels: most pixels the exact mask may cover.

    Raises:
        TrainingError: the texture is no longer finite.
    """
    steps = max(1, round(fields.steps * fields.shape_share))
    search = ShapeSearch(fields, task, pixels=pixels, steps=steps)
    best: Candidate | None = None
    for step in range(1, steps + 1):
        search.step(step)
        if step % fields.check_every == 0 or step == steps:
            checked = search.candidate(step)
            best = checked if best is None or checked.score >= best.score else best
        task.report(step, best.score if best else 0.0)
    assert best is not None
    if steps == fields.steps:
        return best
    start, mask = search.cut(search.texture.detach())
    last = search_under_mask(task, mask, fields.put(mask), start=start, steps_done=steps)
    return last if last.score >= best.score else best


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What the rays must keep to.

    Args:
        pixels: most pixels the exact mask may cover.
        longest: (R,) longest each ray may be.
        window: (h, w), odd and equal, that holds every shape so bounded.
    """

    pixels: int
    longest: Tensor
    window: tuple[int, int]

    @classmethod
    def of(cls, fields: Dpr, *, pixels: int, image_size: tuple[int, int], device: torch.device) -> Bounds:
        """Bounds by settings: no ray is much longer than a disc's, and the box around the shape fits on the image."""
        reach = (_free_side(fields, image_size) - 1) // 2 + 0.5
        turns = torch.arange(fields.rays, device=device) * 2 * math.pi / fields.rays
        to_box = reach / torch.maximum(turns.cos().abs(), turns.sin().abs())
        longest = to_box.clamp(max=fields.longest * _radius(pixels))
        side = 2 * min(math.ceil(float(longest.max())), math.ceil(reach)) + 1
        # At a place close to the border the window itself may hold less than the budget.
        return cls(pixels=min(pixels, side**2 - 1), longest=longest, window=(side, side))

    def hold(self, rays: Tensor) -> Tensor:
        """The rays (R,), cut and scaled to the bounds.

        Cutting rays only takes pixels away, so the budget holds after every round; scaling gives them back elsewhere.
        """
        held = rays.clamp(min=_SHORTEST)
        for _ in range(_ROUNDS):
            held = torch.minimum(fit_to_pixels(held, self.window, pixels=self.pixels), self.longest)
        return held


class ShapeSearch:
    """The search of rays and texture, step by step.

    Args:
        fields: the attack's settings.
        task: what there is to work with.
        pixels: most pixels the exact mask may cover.
        steps: how many there will be.
    """

    def __init__(self, fields: Dpr, task: Task, *, pixels: int, steps: int) -> None:
        device, self._image_size = task.images.device, (task.images.shape[-2], task.images.shape[-1])
        self._fields, self._task = fields, task
        self._bounds = Bounds.of(fields, pixels=pixels, image_size=self._image_size, device=device)
        self._sharpness = _sharpness(fields, pixels, steps)
        self._places = task.stream("shape places")
        self._batches = endless_batches(len(task.images), fields.batch_size, task.stream("shape batches"))

        noise = 1 + _START_NOISE * torch.randn(fields.rays, generator=task.stream("shape start")).to(device)
        self.rays = self._bounds.hold(_radius(pixels) * noise).requires_grad_()
        self.texture = self._start().requires_grad_()
        # The cosine belongs to the texture's own phase: until then the shape it must suit is still moving.
        self._descent = Descent(steps=steps, step_rule=fields.step_rule, lr=fields.step_size, cosine=False)
        self._texture_steps = self._descent.optimizer(self.texture)
        self._ray_steps = torch.optim.Adam([self.rays], lr=fields.ray_lr)

    def step(self, number: int) -> None:
        """One step of both, from the same gradient; `number` counts from 1."""
        index = next(self._batches)
        images, labels = as_float(self._task.images[index]), self._task.labels[index]
        cover = soft_polygon_mask(self.rays, self._bounds.window, sharpness=self._sharpness[number - 1])
        texture = fake_quantize(self.texture, PATCH_FILE_BITS)
        patched = blend(images, texture, cover, self._corners(len(images)))
        excess = (cover.sum() / self._bounds.pixels - 1).relu()
        loss = self._task.loss(patched, labels) + self._fields.area_weight * excess
        for_texture, self.rays.grad = torch.autograd.grad(loss, (self.texture, self.rays))
        self._descent.move(self.texture, for_texture, self._texture_steps, step=number)
        self._ray_steps.step()
        with torch.no_grad():
            self.rays.copy_(self._bounds.hold(self.rays))

    def cut(self, texture: Tensor) -> tuple[Tensor, Tensor]:
        """The box around the exact mask: of a texture (3, *window), and of the mask itself."""
        mask = self._mask()
        row, column, height, width = bounding_box(mask)
        box = slice(row, row + height), slice(column, column + width)
        return texture[:, *box], mask[box]

    def candidate(self, number: int) -> Candidate:
        """The patch as it would be saved now, scored.

        Raises:
            TrainingError: the texture is no longer finite.
        """
        texture, mask = self.cut(round_checked(self.texture, step=number))
        return Candidate(texture=texture, mask=mask, score=self._task.score(self._fields.put(mask), texture))

    @torch.no_grad()
    def _start(self) -> Tensor:
        """A texture for the window. A picture fills the shape's box; what rays may reach later is like its border."""
        mask, window = self._mask(), self._bounds.window
        if self._fields.init != "image":
            return self._task.start_texture(window, self._fields.put(torch.ones_like(mask)))
        row, column, height, width = bounding_box(mask)
        box = slice(row, row + height), slice(column, column + width)
        picture = self._task.start_texture((height, width), self._fields.put(mask[box]))
        beside = column, window[1] - column - width, row, window[0] - row - height
        return pad(picture[None], beside, mode="replicate")[0]

    @torch.no_grad()
    def _mask(self) -> Tensor:
        return polygon_mask(self.rays, self._bounds.window)

    def _corners(self, count: int) -> Tensor:
        """Corners of the windows, so that the boxes around the exact mask lie as the settings say."""
        row, column, height, width = bounding_box(self._mask())
        corners = self._fields.corners(count, self._image_size, (height, width), generator=self._places)
        return corners - corners.new_tensor([row, column])


def _radius(pixels: int) -> float:
    """Radius of a disc of so many pixels."""
    return math.sqrt(pixels / math.pi)


def _sharpness(fields: Dpr, pixels: int, steps: int) -> list[float]:
    """Sharpness of the border at each step, growing by the same factor."""
    by_size = min(_SHARPNESS_PER_PIXEL * _radius(pixels), _LAST_SHARPNESS), _LAST_SHARPNESS
    first, last = fields.sharpness or by_size
    return [first * (last / first) ** (step / max(1, steps - 1)) for step in range(steps)]


def _free_side(fields: Dpr, image_size: tuple[int, int]) -> int:
    """Side of the largest square that fits on the image, at the fixed place or beside the box to keep out of."""
    if fields.place != "random":
        return min(side - start for side, start in zip(image_size, fields.place, strict=True))
    if fields.keep_out is None:
        return min(image_size)
    row, column, height, width = fields.keep_out
    beside = max(row, column, image_size[0] - row - height, image_size[1] - column - width)
    return min(beside, *image_size)
