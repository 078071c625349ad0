"""The contracts of attacks: what each kind of attack gets, returns and declares about itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.core.progress import Progress

Model: TypeAlias = Callable[[Tensor], Tensor]
"""Images (N, 3, H, W) in [0, 1] to logits (N, classes). In evaluation mode, at the precision to be attacked."""

Memory: TypeAlias = dict[str, Tensor]
"""What an attack keeps from one training step to the next: empty before the first, saved with the run."""


class Attack:
    """An attack plug-in: an `ImageAttack`, a `PatchAttack`, or both."""

    black_box: ClassVar[bool] = False
    """Whether it sees nothing of the model but its outputs."""


class ImageAttack(Attack, ABC):
    """An attack that makes adversarial images, one batch at a time."""

    @property
    def not_scored(self) -> str | None:
        """Why its images prove nothing in an evaluation, and what to set instead; None if they can be scored."""
        return None

    @abstractmethod
    def run(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator,
        precision: Precision | None = None,
    ) -> Tensor:
        """Return adversarial versions of `images`.

        Args:
            model: what is attacked. Its parameters receive no gradients.
            images: (N, 3, H, W) in [0, 1].
            labels: (N,), the true classes.
            generator: source of all random draws.
            precision: what the model runs at; None if it is not quantized or not known.

        Returns:
            (N, 3, H, W) in [0, 1].
        """


class TrainingAttack(ImageAttack):
    """An image attack that is cheap enough to run in every training step, on a share of each batch."""

    share: float
    """Share of each training batch that is attacked, in (0, 1]."""

    @property
    def remembers(self) -> bool:
        """Whether `run` takes a `memory`, which training keeps from step to step and saves with the run."""
        return False


class PatchAttack(Attack, ABC):
    """An attack that makes one universal patch."""

    @abstractmethod
    def mask(self, image_size: tuple[int, int]) -> Tensor:
        """Return the pixels that the patch covers, boolean (h, w), for images of (H, W) pixels.

        Raises:
            UsageError: the patch does not fit on the images.
        """

    @abstractmethod
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
        """Make a patch. The model's parameters receive no gradients.

        Args:
            model: what is attacked.
            images: (N, 3, H, W), uint8 or float in [0, 1], on the model's device.
            labels: (N,), the true classes.
            held_out: images and labels on which the best patch is chosen; not those it is scored on.
            seed: the same seed gives the same patch.
            progress: called after every step.
        """
