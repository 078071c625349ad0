"""LaVAN: a universal patch that lowers the true class and raises a target class, wherever it lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qadtr_brevitas.attacks.patch_fields import SearchFields
from qadtr_brevitas.plugin import STRICT, dataclass

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qadtr_brevitas.attacks.base import Model, Progress
    from qadtr_brevitas.attacks.patch import Patch


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Lavan(SearchFields):
    """Universal LaVAN patch (Karmon et al. 2018, image domain): random image, random place, values in [0, 1].

    Descends z_s - z_t, source minus target logit, averaged over a batch. Images of the target class are left out.
    With `target` null the attack is untargeted and descends z_s - max of the others.
    The paper follows the raw gradient with a constant step: `step_rule=sgd cosine=false`.

    On the published float CIFAR ResNet-20 the defaults end where 600 steps, `sgd` and `margin` end too (6x6 pixels,
    target 5: 42 to 44 % of 2,000 test images); `cross-entropy` stays about 3 points behind.
    """

    def fit(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        held_out: tuple[Tensor, Tensor],
        seed: int,
        progress: Progress | None = None,
    ) -> Patch:
        """Makes the patch. The model's parameters get no gradients.

        Args:
            model: in evaluation mode, at the precision to attack.
            images: (N, 3, H, W), uint8 or float in [0, 1], on the model's device.
            labels: (N,).
            held_out: images and labels on which the best texture is chosen; not those of the final score.
            seed: the same seed gives the same patch.
            progress: called after every step.

        Raises:
            UsageError: the patch does not fit on the images, or the model has no class `target`.
            DataError: no images to make it or to choose it on.
            TrainingError: the texture is no longer finite.
        """
        from qadtr_brevitas.attacks.geometry import paste, place_corners
        from qadtr_brevitas.attacks.universal import UniversalSearch

        mask = self.mask((images.shape[-2], images.shape[-1])).to(images.device)
        size = mask.shape[0], mask.shape[1]

        def put(texture: Tensor, images: Tensor, generator: torch.Generator) -> Tensor:
            image_size = images.shape[-2], images.shape[-1]
            return paste(
                images, texture, mask, place_corners(self.place, len(images), image_size, size, generator=generator)
            )

        search = UniversalSearch(name="lavan", fields=self, mask=mask, put=put)
        return search.fit(model, images, labels, held_out=held_out, seed=seed, progress=progress)
