"""Gradients of a loss at one precision against those at the highest: do attacks look the same way?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from qadtr_brevitas.plugin import STRICT, Field, dataclass
from qadtr_brevitas.recipe.slots import Slot
from qadtr_brevitas.registry import ATTACKS

if TYPE_CHECKING:
    from qadtr_brevitas.analyze.base import Context, Findings


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Gradients:
    """Cosine and mean squared error of input gradients between precisions (paper, Figure 4).

    Adversarial images are made at the highest precision, 32 bit where the model has it: with universal patches, and
    with a pixel attack. On the same images the gradient of the cross-entropy with the true class, which both attacks
    drive up, is taken at every precision and compared with the one at the highest: on the pixels of the patch, on the
    whole image, and, for the patch, on the whole image with zeros around the patch, which is all that an attacker with
    a patch uses and makes errors look small by adding pixels without any.
    """

    patches: Annotated[
        tuple[str, ...], Field(description="finished patches, files or folders; none: make them with attack")
    ] = ()
    attack: Annotated[Any, Slot(ATTACKS), Field(description="patch attack, used where no patches are given")] = "lavan"
    targets: Annotated[
        tuple[int, ...] | None, Field(description="classes that patches are made for; null: the first three")
    ] = (0,)
    pixel: Annotated[Any, Slot(ATTACKS), Field(description="attack on every pixel")] = "pgd"
    images: Annotated[int, Field(ge=1, description="at most so many test images, class-balanced")] = 200

    def run(self, context: Context) -> Findings:
        """Measures, and draws gradients.png and cosine.png."""
        from qadtr_brevitas.analyze.gradient_run import run

        return run(self, context)
