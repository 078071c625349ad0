"""LaVAN: a universal patch that lowers the true class and raises a target class, wherever it lies."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from qadtr_brevitas.attacks.patch_fields import SearchFields
from qadtr_brevitas.plugin import STRICT, dataclass

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qadtr_brevitas.attacks.universal import Put


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Lavan(SearchFields):
    """Universal LaVAN patch (Karmon et al. 2018, image domain): random image, random place, values in [0, 1].

    Descends z_s - z_t, source minus target logit, averaged over a batch. Images of the target class are left out.
    With `target` null the attack is untargeted and descends z_s - max of the others.
    The paper follows the raw gradient with a constant step: `step_rule=sgd cosine=false`.

    On the published float CIFAR ResNet-20 the defaults end where 600 steps, `sgd` and `margin` end too (6x6 pixels,
    target 5: 42 to 44 % of 2,000 test images); `cross-entropy` stays about 3 points behind.
    """

    attack: ClassVar[str] = "lavan"

    def put(self, mask: Tensor) -> Put:
        """Pastes it at a place of its own in every image."""
        from qadtr_brevitas.attacks.geometry import paste

        size = mask.shape[0], mask.shape[1]

        def at_places(texture: Tensor, images: Tensor, generator: torch.Generator) -> Tensor:
            image_size = images.shape[-2], images.shape[-1]
            corners = self.corners(len(images), image_size, size, generator=generator)
            return paste(images, texture, mask, corners)

        return at_places
