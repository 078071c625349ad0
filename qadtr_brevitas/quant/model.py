"""The switchable model: pixels in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from qadtr_brevitas.quant.conversion_report import ConversionReport
from qadtr_brevitas.quant.model_info import ModelInfo
from qadtr_brevitas.quant.switch import Switch, frozen_weights


class SwitchableModel(nn.Module):
    """A network with switchable quantizers and its normalization, around one set of weights.

    Args:
        net: the converted network.
        switch: the switch its layers read.
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].

    Attributes:
        image_size: height and width of the images it was converted for, in pixels.
        num_classes: number of logits per image.
        report: what the conversion did to every layer.
        info: what the model was made of; None if unknown.
    """

    mean: Tensor
    std: Tensor
    image_size: tuple[int, int]
    num_classes: int
    report: ConversionReport
    info: ModelInfo | None

    def __init__(self, net: nn.Module, switch: Switch, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.net = net
        self.switch = switch
        self.info = None
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def frozen_weights(self) -> AbstractContextManager[None]:
        """Quantize each weight once for all forward passes of a block (`quant.frozen_weights`)."""
        return frozen_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images.

        Args:
            images: (N, C, H, W) in [0, 1].

        Returns:
            Logits, (N, classes).
        """
        self.switch.images = len(images)
        normalized = (images - self.mean) / self.std
        if (folding := self.switch.folding) is None:
            return self.net(normalized)
        with folding.arithmetic(images):
            return self.net(normalized).to(images.dtype)

    def extra_repr(self) -> str:
        return f"precision={self.switch.precision}, allowed={', '.join(str(p) for p in self.switch.allowed)}"
