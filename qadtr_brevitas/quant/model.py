"""The switchable model: pixels in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.quant.conversion_report import ConversionReport
from qadtr_brevitas.quant.model_info import ModelInfo
from qadtr_brevitas.quant.ptq import CHANGES_SHARED_WEIGHTS
from qadtr_brevitas.quant.switch import Switch, frozen_weights


class SwitchableModel(nn.Module):
    """A network with switchable quantizers and its normalization, around one set of weights.

    Args:
        net: the converted network.
        switch: the switch its layers read.
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
        feature_clips: the clips that hooks of the network call; None for none.

    Attributes:
        image_size: height and width of the images it was converted for, in pixels.
        num_classes: number of logits per image.
        report: what the conversion did to every layer.
        wide_head_input: whether a ReLU keeps 8 bit because the last layer reads it (`convert()`).
        quantize_once: whether what is quantized is not quantized again at the same bit-width (`convert()`).
        info: what the model was made of; None if unknown.
    """

    mean: Tensor
    std: Tensor
    image_size: tuple[int, int]
    num_classes: int
    report: ConversionReport
    wide_head_input: bool = False
    quantize_once: bool = False
    info: ModelInfo | None

    def __init__(
        self,
        net: nn.Module,
        switch: Switch,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        feature_clips: nn.ModuleList | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        if feature_clips is not None:
            self.feature_clips = feature_clips
        self.switch = switch
        self.info = None
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.switch.let_go()

    def __setattr__(self, name: str, value: Any) -> None:
        # Brevitas's modes replace the forward before anything else, and would leave it so after a later refusal.
        if name == "forward" and getattr(value, "__name__", "") == "catch_stopfwd":
            raise UsageError(CHANGES_SHARED_WEIGHTS)
        super().__setattr__(name, value)

    def frozen_weights(self) -> AbstractContextManager[None]:
        """Quantize each weight once for all forward passes of a block (`quant.frozen_weights`)."""
        return frozen_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images.

        Args:
            images: (N, C, H, W) in [0, 1]; a network of one channel takes color images too (`normalize`).

        Returns:
            Logits, (N, classes).
        """
        now = self.switch.states.now
        now.images = len(images)
        if now.passes is not None and now.passes.serves(images):
            return now.passes(images)
        if now.folding is None:
            return self.logits(images)
        with now.folding.arithmetic(images):
            return self.logits(images).to(images.dtype)

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits of images, by the layers themselves and in the arithmetic of the caller."""
        return _checked(self.net(normalize(images, self.mean, self.std)))

    @property
    def channels(self) -> int:
        """The number of channels of images."""
        return self.mean.numel()

    def extra_repr(self) -> str:
        return f"precision={self.switch.precision}, allowed={', '.join(str(p) for p in self.switch.allowed)}"


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return normalized images; color images for a network of one channel become their mean over the channels.

    Args:
        images: (N, C, H, W) in [0, 1].
        mean: (1, C, 1, 1).
        std: (1, C, 1, 1).

    Raises:
        UsageError: images have another number of channels.
    """
    # The shape of an image is a constant of a traced graph, which takes as many channels as the network.
    if not torch.jit.is_tracing():
        images = _with_channels(images, mean.shape[1])
    return (images - mean) / std


def _with_channels(images: Tensor, channels: int) -> Tensor:
    if images.dim() == 4 and images.shape[1] == channels:
        return images
    if images.dim() == 4 and channels == 1 and images.shape[1] == 3:
        return images.mean(1, keepdim=True)
    raise UsageError(
        f"images have the shape {tuple(images.shape)}, but the network takes (N, {channels}, H, W): give images of "
        f"{channels} channel{'' if channels == 1 else 's'}"
    )


def _checked(logits: object) -> Tensor:
    if not isinstance(logits, Tensor):
        raise UsageError(
            f"the network returns {type(logits).__name__} in this mode, not logits alone: make it without auxiliary "
            "outputs (for instance aux_logits=False) and convert it again"
        )
    return logits
