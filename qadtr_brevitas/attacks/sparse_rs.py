"""Sparse-RS patches: random search with nothing but the network's outputs, the check on gradient attacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from qadtr_brevitas.attacks.patch_fields import Index, PatchFields
from qadtr_brevitas.plugin import STRICT, Field, dataclass

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qadtr_brevitas.attacks.base import Model
    from qadtr_brevitas.precision import Precision


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SparseRs(PatchFields):
    """Image-specific Sparse-RS patch (Croce et al. 2022, "Sparse-RS", section on patches), black box.

    A patch of black, white and the six full colors, and its place, are searched at random: a change is kept if it
    lowers the loss. First squares of one color, which shrink as queries are spent, then single pixels, then single
    channels; in between the patch is moved, less and less far. An image that is done is asked no more. Only forward
    passes are made, so masked gradients do not hinder it.

    Values of the official code by default: untargeted margin loss, alpha 0.4, a move every 4th query; targeted
    cross-entropy, alpha 0.1, every 10th. It spends 10,000 queries on 20x20 pixels of 224x224 and 50,000 on a target;
    5,000 suit patches of 8x8 on CIFAR.
    """

    target: Annotated[Index | None, Field(description="class to be seen instead; null: any wrong one")] = None
    queries: Annotated[int, Field(ge=1, description="forward passes for an image, at most, in each restart")] = 5000
    loss: Annotated[
        Literal["logits", "cross-entropy", "margin"] | None,
        Field(description="what is descended; null: margin, or with a target cross-entropy"),
    ] = None
    alpha: Annotated[
        float | None,
        Field(gt=0, le=1, description="share of the patch that a change covers at first; null: 0.4, with a target 0.1"),
    ] = None
    move_every: Annotated[
        int | None, Field(ge=2, description="queries between moves of the patch; null: 4, with a target 10")
    ] = None
    restarts: Annotated[int, Field(ge=1, description="independent runs, of which the best is kept")] = 1

    def run(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator,
        precision: Precision | None = None,
    ) -> Tensor:
        """Patched images. The model is only asked for its outputs.

        Args:
            model: in evaluation mode, at the precision to attack.
            images: (N, 3, H, W) in [0, 1].
            labels: (N,).
            generator: draws starts, changes and places.
            precision: not used; patches have 8 bit.

        Returns:
            (N, 3, H, W) in [0, 1]; pixels outside the masks are those of the images.

        Raises:
            UsageError: the patch does not fit on the images, or the model has no class `target`.
        """
        from qadtr_brevitas.attacks.moves import Ground
        from qadtr_brevitas.attacks.per_image import Aim, Scene, best_of
        from qadtr_brevitas.attacks.random_search import RandomSearch

        image_size = images.shape[-2], images.shape[-1]
        mask = self.mask(image_size).to(images.device)
        size = mask.shape[0], mask.shape[1]
        targeted = self.target is not None
        aim = Aim.at(self.target, labels, loss=self.loss or ("cross-entropy" if targeted else "margin"))
        search = RandomSearch(
            scene=Scene(model=model, images=images, mask=mask, aim=aim),
            draw_corners=lambda: self.corners(len(images), image_size, size, generator=generator),
            ground=Ground.outside(self.keep_out, image_size, size) if self.place == "random" else None,
            queries=self.queries,
            alpha=self.alpha or (0.1 if targeted else 0.4),
            move_every=self.move_every or (10 if targeted else 4),
            generator=generator,
        )
        return best_of(search.run() for _ in range(self.restarts)).images
