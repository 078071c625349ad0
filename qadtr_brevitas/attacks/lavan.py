"""LaVAN: a patch that lowers the true class and raises a target class; one for all images, or one for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from qadtr_brevitas.attacks.patch_fields import SearchFields
from qadtr_brevitas.plugin import STRICT, dataclass

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qadtr_brevitas.attacks.base import Model
    from qadtr_brevitas.attacks.per_image import Attempt
    from qadtr_brevitas.precision import Precision


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Lavan(SearchFields):
    """LaVAN patch (Karmon et al. 2018, image domain): values in [0, 1], a place of its own in every image.

    Descends z_s - z_t, source minus target logit; untargeted (`target` null) z_s - max of the others.
    The paper follows the raw gradient with a constant step: `step_rule=sgd cosine=false`.

    `fit` makes one universal patch: the loss is averaged over a batch, places are drawn anew every step, and images
    of the target class are left out. `run` makes a patch for every image, which lies at one random place throughout
    the search; the best attempt at every image is kept. `batch_size` and `check_every` concern `fit` only.

    On the published float CIFAR ResNet-20 the defaults end where 600 steps, `sgd` and `margin` end too (6x6 pixels,
    target 5: 42 to 44 % of 2,000 test images); `cross-entropy` stays about 3 points behind.
    """

    attack: ClassVar[str] = "lavan"

    def run(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator,
        precision: Precision | None = None,
    ) -> Tensor:
        """Patched images, each with a patch of its own. The model's parameters get no gradients.

        Args:
            model: in evaluation mode, at the precision to attack.
            images: (N, 3, H, W) in [0, 1].
            labels: (N,).
            generator: draws places and starts, new ones with every restart.
            precision: not used; patches have 8 bit.

        Returns:
            (N, 3, H, W) in [0, 1]; pixels outside the masks are those of the images.

        Raises:
            UsageError: the patch does not fit on the images, or the model has no class `target`.
        """
        from qadtr_brevitas.attacks.descent import Descent
        from qadtr_brevitas.attacks.per_image import Aim, Scene, best_of, search_patches, start_patches

        image_size = images.shape[-2], images.shape[-1]
        mask = self.mask(image_size).to(images.device)
        size = mask.shape[0], mask.shape[1]
        scene = Scene(model=model, images=images, mask=mask, aim=Aim.at(self.target, labels, loss=self.loss))
        descent = Descent(steps=self.steps, step_rule=self.step_rule, lr=self.step_size, cosine=self.cosine)

        def one_run() -> Attempt:
            corners = self.corners(len(images), image_size, size, generator=generator).to(images.device)
            patches = start_patches(self.init, images, size, generator=generator)
            return search_patches(scene, patches, corners, descent=descent)

        return best_of(one_run() for _ in range(self.restarts)).images
