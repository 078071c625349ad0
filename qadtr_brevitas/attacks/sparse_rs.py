"""Sparse-RS patches: random search with nothing but the network's outputs, the check on gradient attacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from qadtr_brevitas.attacks.image_patch import ImagePatch
from qadtr_brevitas.attacks.patch_fields import Index
from qadtr_brevitas.plugin import STRICT, Field, dataclass

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qadtr_brevitas.attacks.per_image import Attempt, Task


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SparseRs(ImagePatch):
    """Image-specific Sparse-RS patch (Croce et al. 2022, "Sparse-RS", section on patches), black box.

    A patch of black, white and the six full colors, and its place, are searched at random: a change is kept if it
    lowers the loss. First squares of one color, which shrink as queries are spent, then single pixels, then single
    channels; in between the patch is moved, less and less far. An image that is done is asked no more. Only forward
    passes are made, so masked gradients do not hinder it.

    Values of the official code by default: untargeted margin loss, alpha 0.4, a move every 4th query; targeted
    cross-entropy, alpha 0.1, every 10th. It spends 10,000 queries on 20x20 pixels of 224x224 and 50,000 on a target;
    5,000 suit patches of 8x8 on CIFAR.
    """

    black_box: ClassVar[bool] = True

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

    def attempts(self, task: Task) -> Iterator[Attempt]:
        """One search from each start, at places drawn anew; the model is only asked for its outputs."""
        from qadtr_brevitas.attacks.moves import Ground
        from qadtr_brevitas.attacks.random_search import RandomSearch

        count, image_size, size = len(task.images), task.image_size, task.size
        targeted = self.target is not None
        search = RandomSearch(
            scene=task.scene(self.target, loss=self.loss or ("cross-entropy" if targeted else "margin")),
            draw_corners=lambda: self.corners(count, image_size, size, generator=task.generator),
            ground=Ground.outside(self.keep_out, image_size, size) if self.place == "random" else None,
            queries=self.queries,
            alpha=self.alpha or (0.1 if targeted else 0.4),
            move_every=self.move_every or (10 if targeted else 4),
            generator=task.generator,
        )
        return (search.run() for _ in range(self.restarts))
