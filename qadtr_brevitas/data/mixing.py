"""Mixup and CutMix of a batch, through timm: images are mixed with the batch in reverse, labels become shares."""

from __future__ import annotations

from dataclasses import dataclass

import numpy
from timm.data.mixup import Mixup
from torch import Tensor

from qadtr_brevitas.data.transform import own_random_streams


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Mixes the images of a batch.

    Args:
        classes: number of classes.
        mixup: parameter of the Beta distribution of mixup's shares (Zhang et al. 2018); 0 for no mixup.
        cutmix: that of CutMix (Yun et al. 2019); 0 for no CutMix.
        mix_probability: of a batch being mixed.
        cutmix_probability: of CutMix instead of mixup, where there are both.
    """

    classes: int
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0
    cutmix_probability: float = 0.5

    def __call__(self, images: Tensor, labels: Tensor, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return mixed images, the class of the larger share of each (n,), and the shares (n, classes).

        Args:
            images: (n, C, H, W) in [0, 1], n even; they are written over.
            labels: (n,).
            seed: decides the shares and the cuts.
        """
        mixer = Mixup(
            self.mixup,
            self.cutmix,
            prob=self.mix_probability,
            switch_prob=self.cutmix_probability,
            label_smoothing=0.0,
            num_classes=self.classes,
        )
        with own_random_streams():
            numpy.random.seed(seed & 0xFFFFFFFF)
            images, shares = mixer(images, labels)
        return images, shares.argmax(dim=1), shares
