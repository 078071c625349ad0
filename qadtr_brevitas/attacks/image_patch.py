"""Patch attacks on each image by itself, as recipe and command line know them."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from qadtr_brevitas.attacks.patch_fields import PatchFields
from qadtr_brevitas.plugin import STRICT, dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import Tensor

    from qadtr_brevitas.attacks.base import Model
    from qadtr_brevitas.attacks.per_image import Attempt, Task
    from qadtr_brevitas.precision import Precision


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ImagePatch(PatchFields):
    """A patch of its own for every image. A subclass says how each attempt is made."""

    @abstractmethod
    def attempts(self, task: Task) -> Iterable[Attempt]:
        """Independent attempts at all images, of which the best is kept for every image."""
        ...

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
            generator: draws places, starts and whatever else the search draws.
            precision: not used; patches have 8 bit.

        Returns:
            (N, 3, H, W) in [0, 1]; pixels outside the masks are those of the images.

        Raises:
            UsageError: the patch does not fit on the images or beside the box, or the model has no class `target`.
        """
        from qadtr_brevitas.attacks.per_image import Task, best_of

        mask = self.mask((images.shape[-2], images.shape[-1])).to(images.device)
        task = Task(model=model, images=images, labels=labels, mask=mask, generator=generator)
        return best_of(self.attempts(task)).images
