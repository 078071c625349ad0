"""DPR: a universal patch whose shape is searched together with its texture, at the pixel budget of a fixed shape."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from qadtr_brevitas.attacks.patch_fields import SearchFields
from qadtr_brevitas.plugin import STRICT, Field, dataclass

if TYPE_CHECKING:
    from torch import Tensor

    from qadtr_brevitas.attacks.universal import Candidate, Task

Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
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

    def search(self, task: Task, mask: Tensor) -> Candidate:
        """One search from one start, with as many pixels as the mask covers."""
        from qadtr_brevitas.attacks.deform import search_shape

        return search_shape(self, task, pixels=int(mask.sum()))
