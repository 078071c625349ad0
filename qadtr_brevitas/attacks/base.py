"""What an attack sees and what it offers. Light to import: attacks are named in recipes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.core.progress import Progress

Model: TypeAlias = "Callable[[Tensor], Tensor]"
"""Images (N, 3, H, W) in [0, 1] to logits (N, classes). In evaluation mode, at the precision to be attacked."""

Memory: TypeAlias = "dict[str, Tensor]"
"""What an attack keeps from one training step to the next: empty before the first, saved with the run."""


class ImageAttack(Protocol):
    """An attack that makes adversarial images, one batch at a time (in training and evaluation).

    A class attribute `black_box = True` says that it sees nothing but the model's outputs; an attribute `remembers`
    that is true, that in training `run` is also given a `memory`, always the same one, which it may change; a text
    `not_scored`, that it is good for training alone and why.
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
        """Adversarial versions of `images` (N, 3, H, W) in [0, 1], of the same shape and range."""
        ...


class PatchAttack(Protocol):
    """An attack that makes one patch for all images."""

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
        """A patch made on `images` (N, 3, H, W), uint8 or float in [0, 1], and chosen on the `held_out` ones."""
        ...
