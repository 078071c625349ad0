"""Feature maps with and without a patch: does what a patch does inside a network survive fewer bits?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from qadtr_brevitas.plugin import STRICT, Field, dataclass
from qadtr_brevitas.recipe.slots import Slot
from qadtr_brevitas.registry import ATTACKS

if TYPE_CHECKING:
    from qadtr_brevitas.analyze.base import Context, Findings


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Features:
    """Feature maps of clean and patched images at every precision (paper, Figure 3).

    For each layer: how strongly the map changes at the patch and away from it, as a share of the clean map's size, and
    how far the change points where it does at the highest precision (cosine), which is also where patches are made.
    """

    patches: Annotated[
        tuple[str, ...], Field(description="finished patches, files or folders; none: make them with attack")
    ] = ()
    attack: Annotated[Any, Slot(ATTACKS), Field(description="patch attack, used where no patches are given")] = "lavan"
    targets: Annotated[
        tuple[int, ...] | None, Field(description="classes that patches are made for; null: the first three")
    ] = (0,)
    layers: Annotated[
        tuple[str, ...], Field(description="layers whose output is looked at; none: the first three convolutions")
    ] = ()
    images: Annotated[int, Field(ge=1, description="at most so many test images, class-balanced")] = 64

    def run(self, context: Context) -> Findings:
        """Measures, and draws features-MODEL.png for each model."""
        from qadtr_brevitas.analyze.feature_run import run

        return run(self, context)
