"""Patches shifted and turned: does a patch work where and as it was not made?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from qadtr_brevitas.plugin import STRICT, Field, dataclass
from qadtr_brevitas.recipe.slots import Slot
from qadtr_brevitas.registry import ATTACKS

if TYPE_CHECKING:
    from qadtr_brevitas.analyze.base import Context, Findings

Pixels = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Spatial:
    """ASR of patches made at the highest precision at one place, shifted from there, and turned (paper, Table 20).

    Patches are made for random places, and scored there as well. The paper does not say where it shifts patches from;
    18 pixels leave room on images of 32x32 for a patch of 6x6 up to row and column 8.
    """

    patches: Annotated[
        tuple[str, ...], Field(description="finished patches, files or folders; none: make them with attack")
    ] = ()
    attack: Annotated[Any, Slot(ATTACKS), Field(description="patch attack, used where no patches are given")] = Field(
        default_factory=lambda: {"name": "lavan", "size": 6}
    )
    targets: Annotated[
        tuple[Index, ...] | None, Field(description="classes that patches are made for; null: the first three")
    ] = None
    at: Annotated[
        tuple[Index, Index], Field(description="row and column of the place that patches are shifted from")
    ] = (
        2,
        2,
    )
    shifts: Annotated[tuple[Pixels, ...], Field(description="pixels to shift down and to the right")] = (2, 8, 18)
    degrees: Annotated[tuple[float, ...], Field(description="angles to turn by")] = (5, 10, 20, 30)

    def run(self, context: Context) -> Findings:
        """Scores, and draws shifts.png and turns.png."""
        from qadtr_brevitas.analyze.spatial_run import run

        return run(self, context)
