"""The defended classifier as a user deploys it: classes of images, whether each is certified, and an attack on it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from qadtr_brevitas.core.errors import DataError
from qadtr_brevitas.core.patch_size import PatchSizeLike
from qadtr_brevitas.core.precision import PrecisionLike
from qadtr_brevitas.core.seeding import generator
from qadtr_brevitas.evaluation.adaptive_patch import AdaptivePatches, adaptive_patches
from qadtr_brevitas.evaluation.certification import Certification
from qadtr_brevitas.evaluation.defended import DefendedModel, defended
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.quant import at_precision, frozen_weights, precisions_or_all
from qadtr_brevitas.quant.switch import evaluating


@dataclass(frozen=True)
class DefendedPrediction:
    """What a defended classifier says of images.

    Args:
        classes: (N,) int64, the defended predictions.
        certified: (N,) bool, True where no patch of the size that is put on this image changes the prediction.
        passes: (N,) int64, forward passes that each image took.
    """

    classes: Tensor
    certified: Tensor
    passes: Tensor


class DefendedClassifier:
    """A network at one precision behind a defense by masks, to be deployed: `classifier(images)`.

    `qb.evaluate` takes it as a model, so that patches and attacks meet the defended prediction, at all precisions of
    the network or at those named there.

    Args:
        loaded: the network.
        precision: the precision it answers at.
        certification: the defense.
        batch_size: masked images in one forward pass.
    """

    def __init__(
        self, loaded: LoadedModel, precision: PrecisionLike, certification: Certification, *, batch_size: int = 256
    ) -> None:
        (self.precision,) = precisions_or_all(loaded.model, [precision])
        self.certification = certification
        self.undefended = loaded
        self.loaded = defended(loaded, certification, batch_size=batch_size)

    @property
    def masks(self) -> Tensor:
        """Boolean (M, H, W), True where an image is covered."""
        return self.certification.covering(self.loaded.info.image_size)

    def __call__(self, images: Tensor, *, prove: bool = True) -> DefendedPrediction:
        """Classify images; mode and precision of the network are as before afterwards.

        Args:
            images: (N, C, H, W), uint8 or in [0, 1], on the device of the network.
            prove: whether to certify; without, no image is, and most take one pass for each mask.

        Raises:
            DataError: the images are not of the size of the network.
        """
        height, width = self.loaded.info.image_size
        if images.ndim != 4 or images.shape[2:] != (height, width):
            raise DataError(
                f"images of shape {tuple(images.shape)} do not fit: the masks are for a batch (N, "
                f"{len(self.loaded.info.mean)}, {height}, {width})"
            )
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images
        with self._answering() as network:
            found = network.decide(pixels, prove=prove)
        assert found.passes is not None
        return DefendedPrediction(found.defended, found.proved >= 0, found.passes)

    def attack(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        size: PatchSizeLike | None = None,
        steps: int = 50,
        restarts: int = 2,
        seed: int = 0,
    ) -> AdaptivePatches:
        """Patch images where the two-mask test fails (`adaptive_patches`): how much the defense holds beyond its proof.

        Args:
            images: (N, C, H, W) in [0, 1], on the device of the network.
            labels: (N,), the true classes.
            size: of the patch; None for the size that is defended against.
            steps: sign steps of the texture.
            restarts: searches, each at the next best place.
            seed: the same seed gives the same patches.

        Raises:
            UsageError: the defense is not double masking.
        """
        draw = generator(seed, "adaptive patch")
        with self._answering() as network, torch.enable_grad():
            return adaptive_patches(network, images, labels, size=size, steps=steps, restarts=restarts, generator=draw)

    @contextmanager
    def _answering(self) -> Generator[DefendedModel]:
        """Put the network at its precision, in eval mode and with frozen weights for the duration of a block."""
        network = cast(DefendedModel, self.loaded.model)
        with at_precision(network, self.precision), evaluating(network), frozen_weights(network):
            yield network
