"""GAP, the adversarial patch: a universal patch that works wherever it lies, turned, scaled and in any light."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import model_validator

from qadtr_brevitas.attacks.patch_fields import SearchFields
from qadtr_brevitas.errors import UsageError
from qadtr_brevitas.plugin import STRICT, Field, dataclass

if TYPE_CHECKING:
    from torch import Tensor

    from qadtr_brevitas.attacks.universal import Put

Factor = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Gap(SearchFields):
    """Universal adversarial patch (Brown et al. 2017): expectation over transformations (EOT), cross-entropy to target.

    Every image of every step gets the patch turned, scaled and shifted its own way, whole and inside the image. Colors
    are interpolated, the mask of each is exact. With `target` null the attack is untargeted.

    The budget is that of the patch at scale 1, which is how it is saved. The published notebook scales a patch as large
    as the image by 0.1 to 1 (`size=<side of the image> scale=[0.1,1]`), where one of a few pixels would vanish; hence
    0.9 to 1.1. It follows the raw gradient with a constant step (`step_rule=sgd cosine=false`).
    """

    attack: ClassVar[str] = "gap"

    shape: Annotated[Literal["square", "rectangle", "disc"], Field(description="what the patch covers")] = "disc"
    loss: Annotated[Literal["logits", "cross-entropy", "margin"], Field(description="what is descended")] = (
        "cross-entropy"
    )
    degrees: Annotated[float, Field(ge=0, le=180, description="turned by up to so much, either way")] = 22.5
    scale: Annotated[tuple[Factor, Factor], Field(description="[smallest, largest] scale")] = (0.9, 1.1)
    contrast: Annotated[float, Field(ge=0, lt=1, description="colors times 1 +- up to this")] = 0.0
    brightness: Annotated[float, Field(ge=0, le=1, description="colors plus or minus up to this")] = 0.0

    @model_validator(mode="after")
    def _ordered(self) -> Gap:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale {list(self.scale)} is the wrong way round: give [smallest, largest]")
        return self

    def mask(self, image_size: tuple[int, int]) -> Tensor:
        """The pixels the patch covers at scale 1, boolean (h, w), for images of (H, W) pixels.

        Raises:
            UsageError: the patch does not fit on the image at its place and at its largest scale.
        """
        mask = super().mask(image_size)
        if any(side * self.scale[1] > limit for side, limit in zip(mask.shape, image_size, strict=True)):
            raise UsageError(
                f"a {mask.shape[0]}x{mask.shape[1]} patch scaled by up to {self.scale[1]:g} is larger than the "
                f"{image_size[0]}x{image_size[1]} image: give a smaller size or scale"
            )
        return mask

    def put(self, mask: Tensor) -> Put:
        """Transforms it anew for every image and pastes it there."""
        from qadtr_brevitas.attacks.eot import PutTransformed

        return PutTransformed(self, mask)
