"""Accuracy under attacks on every pixel, the further they may go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from qadtr_brevitas.plugin import STRICT, Field, dataclass
from qadtr_brevitas.recipe.slots import Slot
from qadtr_brevitas.registry import ATTACKS

if TYPE_CHECKING:
    from qadtr_brevitas.analyze.base import Context, Findings

Distance = Annotated[float, Field(ge=0, le=1)]
PixelAttackSlot = Annotated[Any, Slot(ATTACKS)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Pixel:
    """Accuracy against eps under pixel attacks at every precision (paper, Figure 1).

    Attacks are made on the precision attacked, and, for comparison, at 32 bit: that attacks made at 32 bit lose their
    force at few bits says nothing about an attacker who knows the bits. Images count that are right with and without
    the attack. The paper's fourth attack, `autoattack`, is an extra of the installation and takes long.
    """

    attacks: Annotated[
        tuple[PixelAttackSlot, ...], Field(min_length=1, description="pixel attacks; their eps is replaced")
    ] = ("fgsm", "pgd", "mi-fgsm")
    eps: Annotated[tuple[Distance, ...], Field(min_length=1, description="largest changes of a value, in [0, 1]")] = (
        0.0,
        0.005,
        0.01,
        0.015,
        0.02,
        0.03,
    )
    transfer: Annotated[
        Literal["float", "none"], Field(description="float: score attacks made at 32 bit at the others too")
    ] = "float"

    def run(self, context: Context) -> Findings:
        """Scores, and draws a picture for each attack."""
        from qadtr_brevitas.analyze.pixel_run import run

        return run(self, context)
