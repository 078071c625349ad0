"""Patches of several sizes: how large must a patch be, and does that depend on the bits?"""

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
class Size:
    """ASR of patches of several sizes, made at the highest precision, at every precision (paper, Table 21)."""

    patches: Annotated[
        tuple[str, ...], Field(description="finished patches, files or folders; none: make them with attack")
    ] = ()
    attack: Annotated[
        Any, Slot(ATTACKS), Field(description="patch attack with a size, used where no patches are given")
    ] = "lavan"
    sizes: Annotated[tuple[Pixels, ...], Field(min_length=1, description="sides or diameters in pixels")] = (
        6,
        8,
        10,
        12,
    )
    targets: Annotated[
        tuple[Index, ...] | None, Field(description="classes that patches are made for; null: the first three")
    ] = None

    def run(self, context: Context) -> Findings:
        """Scores, and draws size.png."""
        from qadtr_brevitas.analyze.size_run import run

        return run(self, context)
