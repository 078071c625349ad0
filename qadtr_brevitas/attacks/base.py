"""The contracts of attacks: what each kind of attack gets, returns and declares about itself.

`ImageAttack` and `PatchAttack` are the two kinds; an attack may be both. The other classes declare optional abilities:
an attack that derives from one of them has the keys that the class names in `required_keys`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, TypeAlias

import torch
from torch import Tensor, nn

from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.core.progress import Progress

Model: TypeAlias = Callable[[Tensor], Tensor]
"""Images (N, C, H, W) in [0, 1] to logits (N, classes). In evaluation mode, at the precision to be attacked."""

Memory: TypeAlias = dict[str, Tensor]
"""What an attack keeps from one training step to the next: empty before the first, saved with the run."""


class Attack:
    """An attack plug-in: an `ImageAttack`, a `PatchAttack`, or both."""

    required_keys: ClassVar[tuple[str, ...]] = ()
    """Keys that a plug-in which derives from this class has to have as fields."""

    black_box: ClassVar[bool] = False
    """Whether the attack uses the model's outputs only, never its gradients."""

    def with_settings(self, **settings: Any) -> Self:
        """Return a copy of the attack with other values of some of its keys."""
        return replace(self, **settings)  # pyright: ignore[reportArgumentType, reportUnknownVariableType]


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
        """Return adversarial versions of images, which are not changed themselves.

        Args:
            model: the model under attack. Its parameters receive no gradients.
            images: (N, C, H, W) in [0, 1].
            labels: (N,), the true classes.
            generator: source of all random draws.
            precision: precision the model runs at; None if it is not quantized or the precision is not known.

        Returns:
            (N, C, H, W) in [0, 1].
        """


@dataclass(frozen=True)
class Passes:
    """Numbers of forward and of backward passes."""

    forward: int
    backward: int

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.forward + other.forward, self.backward + other.backward)


class IndexedAttack(ImageAttack):
    """An image attack whose draws for an image depend on the seed and on the image's index only.

    What it makes of an image is the same whatever else is in its batch.
    """

    @property
    @abstractmethod
    def passes(self) -> Passes:
        """Passes for an image, at most."""

    @abstractmethod
    def run(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator,
        precision: Precision | None = None,
        indices: Sequence[int] | None = None,
        pictures: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return adversarial versions of images, as `ImageAttack.run` does.

        Args:
            model: the model under attack. Its parameters receive no gradients.
            images: (N, C, H, W) in [0, 1].
            labels: (N,), the true classes.
            generator: gives the seed of all draws.
            precision: precision the model runs at; None if it is not quantized or the precision is not known.
            indices: numbers of the images in their data set; None for 0, 1, 2, ...
            pictures: images (K, C, H, W) in [0, 1] and labels (K,) that the attack may start from; None for the images
                of the batch, on which an image's result then depends.

        Returns:
            (N, C, H, W) in [0, 1].
        """


class DefenseAttack(ImageAttack):
    """An image attack on a defended prediction, which has to know the defense and not only its outputs."""

    @abstractmethod
    def accepts(self, network: nn.Module) -> bool:
        """Return whether a model is behind the defense that this attack is for."""

    @abstractmethod
    def run_against(self, defended: nn.Module, images: Tensor, labels: Tensor, *, generator: torch.Generator) -> Tensor:
        """Return adversarial versions of images, as `ImageAttack.run` does.

        Args:
            defended: a model that the attack accepts, in evaluation mode, at the precision to be attacked.
            images: (N, C, H, W) in [0, 1].
            labels: (N,), the true classes.
            generator: source of all random draws.

        Returns:
            (N, C, H, W) in [0, 1].
        """

    def run(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator,
        precision: Precision | None = None,
    ) -> Tensor:
        """Refuse a model without its defense.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"{type(self).__name__} attacks a defended prediction: give `evaluate` --defend SIZE with it, or leave it "
            "out"
        )


class PatchAttack(Attack, ABC):
    """An attack that makes one universal patch."""

    searches_shape: ClassVar[bool] = False
    """Whether the shape of the patch is searched too: it then covers at most as many pixels as `mask` has."""

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
        held_out: tuple[Tensor, Tensor] | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Patch:
        """Make a patch. The model's parameters receive no gradients.

        Args:
            model: the model under attack.
            images: (N, C, H, W), uint8 or float in [0, 1], on the model's device.
            labels: (N,), the true classes.
            held_out: images and labels on which the best patch is chosen, not those it is scored on; None to take a
                fifth of the images for it.
            seed: the same seed gives the same patch.
            progress: called after every step.
        """


class TargetedAttack(Attack):
    """An attack that can aim at a class."""

    required_keys: ClassVar[tuple[str, ...]] = ("target",)

    target: int | None
    """The class that the model is to predict; None if any wrong class counts."""


class IterativeAttack(Attack):
    """An attack whose cost is a number of gradient steps."""

    required_keys: ClassVar[tuple[str, ...]] = ("steps",)

    steps: int
    """Gradient steps of one run."""


class PixelAttack(ImageAttack):
    """An image attack that may change every pixel, each value by a small distance."""

    required_keys: ClassVar[tuple[str, ...]] = ("eps",)

    eps: float
    """Largest change of a value, for values in [0, 1]."""


class TrainingAttack(ImageAttack):
    """An image attack that is cheap enough to run in every training step, on a share of each batch."""

    required_keys: ClassVar[tuple[str, ...]] = ("share",)

    share: float
    """Share of each training batch that is attacked, in (0, 1]."""


class RememberingAttack(TrainingAttack):
    """A training attack that can keep tensors from one step to the next."""

    @property
    @abstractmethod
    def remembers(self) -> bool:
        """Whether these settings need the memory."""

    @abstractmethod
    def run(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator,
        precision: Precision | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        """Return adversarial versions of images, as `ImageAttack.run` does.

        Args:
            model: the model under attack. Its parameters receive no gradients.
            images: (N, C, H, W) in [0, 1].
            labels: (N,), the true classes.
            generator: source of all random draws.
            precision: precision the model runs at; None if it is not quantized or the precision is not known.
            memory: tensors that training keeps from step to step and saves with the run; changed in place.

        Returns:
            (N, C, H, W) in [0, 1].
        """
