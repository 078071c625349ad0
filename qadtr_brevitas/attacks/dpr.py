"""DPR: a universal patch whose shape is searched together with its texture, at the pixel budget of a fixed shape.

Polygons from rays: a shape that gradients can change (Chen et al., ECCV 2022, Deformable Patch Representation).

R rays of lengths r_i leave the middle O of a window at the angles 2 pi i / R, counted from the columns' direction
towards the rows'. The polygon through their ends is star-shaped around O, so it has no holes, and its boundary in the
sector of rays i and i + 1, at the angle a behind ray i and with D = 2 pi / R, lies at the distance

    r_i r_(i+1) sin D / (r_i sin a + r_(i+1) sin(D - a)).

Lengths are in pixels, from center to center. Every function also takes many polygons at once: rays (..., R).

The search of DPR: the rays of a polygon together with its texture, then the texture alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from qadtr_brevitas.attacks.engine import Descent, as_float, endless_batches, round_checked
from qadtr_brevitas.attacks.fake_quantize import PATCH_FILE_BITS, fake_quantize
from qadtr_brevitas.attacks.geometry import blend, bounding_box
from qadtr_brevitas.attacks.universal import Candidate, SearchFields, TextureSearch, search_under_mask
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.plugin import Field, plugin

Positive = Annotated[float, Field(gt=0)]


@plugin
class Dpr(SearchFields):
    """Deformable patch (Chen et al., ECCV 2022, "Shape Matters"), universal: a polygon from rays and its texture.

    For the first part of the steps rays and texture are moved together, under a mask with a soft border that is
    sharpened step by step; then the mask becomes exact and the texture alone goes on. `size`, `np` and `shape` give the
    budget: the exact mask never covers more pixels than that shape, and as a rule just as many.

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

    rays: Annotated[int, Field(ge=3, description="corners of the polygon")] = 36
    ray_lr: Annotated[float, Field(gt=0, description="step of the rays' lengths in pixels")] = 0.1
    shape_share: Annotated[float, Field(gt=0, le=1, description="share of the steps in which the shape changes")] = 0.5
    sharpness: Annotated[
        tuple[Positive, Positive] | None,
        Field(description="[first, last] sharpness of the soft border; null: by the size of the patch"),
    ] = None
    area_weight: Annotated[float, Field(ge=0, description="weight of the area above the budget, in budgets")] = 1.0
    longest: Annotated[float, Field(ge=1, description="longest ray, in radii of a disc of the same area")] = 2.0

    def search(self, texture_search: TextureSearch, mask: Tensor) -> Candidate:
        """One search from one start, with as many pixels as the mask covers."""
        return search_shape(self, texture_search, pixels=int(mask.sum()))


_FEWEST_RAYS = 3


def polygon_mask(rays: Tensor, size: tuple[int, int]) -> Tensor:
    """The pixels whose center lies in the polygon.

    Args:
        rays: (..., R), positive.
        size: (h, w) of the window, in pixels.

    Returns:
        Boolean (..., h, w).

    Raises:
        UsageError: fewer than three rays.
    """
    return distance_ratios(rays, size) <= 1


def soft_polygon_mask(rays: Tensor, size: tuple[int, int], *, sharpness: float) -> Tensor:
    """The polygon with a blurred border, differentiable in the rays: (tanh(s (1 - u)) + 1) / 2.

    u is a pixel's distance from the middle over the boundary's in its direction; the paper's lambda is -s. The border
    is about r / s pixels wide: where it is much narrower than a pixel, most rays get no gradient.

    Args:
        rays: (..., R), positive.
        size: (h, w) of the window, in pixels.
        sharpness: s, positive.

    Returns:
        (..., h, w) in [0, 1]; at least 0.5 where `polygon_mask` is True and nowhere else.

    Raises:
        UsageError: fewer than three rays.
    """
    return (torch.tanh(sharpness * (1 - distance_ratios(rays, size))) + 1) / 2


def polygon_area(rays: Tensor) -> Tensor:
    """Area of polygons (..., R) in pixels, sin(2 pi / R) / 2 * sum of r_i r_(i+1), as (...).

    Raises:
        UsageError: fewer than three rays.
    """
    return (rays * rays.roll(-1, -1)).sum(-1) * math.sin(_sector_width(rays)) / 2


def fit_to_pixels(rays: Tensor, size: tuple[int, int], *, pixels: int) -> Tensor:
    """The same shape, as large as it may be to cover at most `pixels` pixels of the window.

    A pixel is in the shape scaled by t if and only if its u is at most t, so the scale follows from the sorted u: no
    search, and the budget holds on the exact mask and not only on the area. Fewer are covered where the next ones
    would come several at once.

    Args:
        rays: (..., R), positive.
        size: (h, w) of the window, odd, so that one pixel is in the middle.
        pixels: the budget, less than the window has.

    Returns:
        (..., R).

    Raises:
        UsageError: fewer than three rays.
    """
    ratios = distance_ratios(rays, size).flatten(-2).sort(-1).values
    beyond = ratios[..., pixels, None]
    # Half way between the last pixel and the next one: rounding errors of the scaled rays then change nothing.
    last = ratios.masked_fill(ratios > beyond * (1 - _SAME), 0).amax(-1, keepdim=True)
    return rays * (last + beyond) / 2


_SAME = 1e-4
"""Pixels whose u differ relatively by less are taken to come at once."""


def distance_ratios(rays: Tensor, size: tuple[int, int]) -> Tensor:
    """u (..., h, w): distance of each pixel of the window from its middle, over the boundary's in that direction.

    Raises:
        UsageError: fewer than three rays.
    """
    width = _sector_width(rays)
    rows, columns = (torch.arange(side, device=rays.device, dtype=rays.dtype) - (side - 1) / 2 for side in size)
    rows, columns = rows[:, None], columns[None, :]
    angles = torch.atan2(rows, columns).remainder(2 * math.pi)
    # By a quotient of floats and not by whole degrees, or only divisors of 360 would give the right sector. Rounding
    # may put an angle just below the full turn behind the last sector.
    sectors = (angles / width).floor().long().clamp(max=rays.shape[-1] - 1)
    behind = angles - sectors * width
    near, far = rays[..., sectors], rays.roll(-1, -1)[..., sectors]
    inverse_boundary = ((width - behind).sin() / near + behind.sin() / far) / math.sin(width)
    return torch.hypot(rows, columns) * inverse_boundary


def _sector_width(rays: Tensor) -> float:
    if rays.shape[-1] < _FEWEST_RAYS:
        raise UsageError(f"{rays.shape[-1]} rays make no polygon: give at least {_FEWEST_RAYS}")
    return 2 * math.pi / rays.shape[-1]


_SHARPNESS_PER_PIXEL = 4.5
_LAST_SHARPNESS = 100.0
_START_NOISE = 0.05
_SHORTEST = 0.5
_ROUNDS = 3


def search_shape(fields: Dpr, texture_search: TextureSearch, *, pixels: int) -> Candidate:
    """Searches shape and texture, then the texture alone; returns the best by held-out score, with its exact mask.

    Args:
        fields: the attack's settings.
        texture_search: what there is to work with.
        pixels: most pixels the exact mask may cover.

    Raises:
        TrainingError: the texture is no longer finite.
    """
    steps = max(1, round(fields.steps * fields.shape_share))
    search = ShapeSearch(fields, texture_search, pixels=pixels, steps=steps)
    best: Candidate | None = None
    for step in range(1, steps + 1):
        search.step(step)
        if step % fields.check_every == 0 or step == steps:
            checked = search.candidate(step)
            best = checked if best is None or checked.score >= best.score else best
        texture_search.report(step, best.score if best else 0.0)
    assert best is not None
    if steps == fields.steps:
        return best
    start, mask = search.cut(search.texture.detach())
    last = search_under_mask(texture_search, mask, fields.put(mask), start=start, steps_done=steps)
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
        texture_search: what there is to work with.
        pixels: most pixels the exact mask may cover.
        steps: how many there will be.
    """

    def __init__(self, fields: Dpr, texture_search: TextureSearch, *, pixels: int, steps: int) -> None:
        device, self._image_size = (
            texture_search.images.device,
            (texture_search.images.shape[-2], texture_search.images.shape[-1]),
        )
        self._fields, self._texture_search = fields, texture_search
        self._bounds = Bounds.of(fields, pixels=pixels, image_size=self._image_size, device=device)
        self._sharpness = _sharpness(fields, pixels, steps)
        self._places = texture_search.stream("shape places")
        self._batches = endless_batches(
            len(texture_search.images), fields.batch_size, texture_search.stream("shape batches")
        )

        noise = 1 + _START_NOISE * torch.randn(fields.rays, generator=texture_search.stream("shape start")).to(device)
        self.rays = self._bounds.hold(_radius(pixels) * noise).requires_grad_()
        self.texture = self._start().requires_grad_()
        # The cosine belongs to the texture's own phase: until then the shape it must suit is still moving.
        self._descent = Descent(steps=steps, step_rule=fields.step_rule, lr=fields.step_size, cosine=False)
        self._texture_steps = self._descent.optimizer(self.texture)
        self._ray_steps = torch.optim.Adam([self.rays], lr=fields.ray_lr)

    def step(self, number: int) -> None:
        """One step of both, from the same gradient; `number` counts from 1."""
        index = next(self._batches)
        images, labels = as_float(self._texture_search.images[index]), self._texture_search.labels[index]
        cover = soft_polygon_mask(self.rays, self._bounds.window, sharpness=self._sharpness[number - 1])
        texture = fake_quantize(self.texture, PATCH_FILE_BITS)
        patched = blend(images, texture, cover, self._corners(len(images)))
        excess = (cover.sum() / self._bounds.pixels - 1).relu()
        loss = self._texture_search.loss(patched, labels) + self._fields.area_weight * excess
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
        return Candidate(texture=texture, mask=mask, score=self._texture_search.score(self._fields.put(mask), texture))

    @torch.no_grad()
    def _start(self) -> Tensor:
        """A texture for the window. A picture fills the shape's box; what rays may reach later is like its border."""
        mask, window = self._mask(), self._bounds.window
        if self._fields.init != "image":
            return self._texture_search.start_texture(window, self._fields.put(torch.ones_like(mask)))
        row, column, height, width = bounding_box(mask)
        box = slice(row, row + height), slice(column, column + width)
        picture = self._texture_search.start_texture((height, width), self._fields.put(mask[box]))
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
