"""Residual networks for CIFAR (He et al. 2016, section 4.2): 6n+2 layers in three stages of 16, 32 and 64 channels.

Names of parameters are those of Y. Idelbayev's pytorch_resnet_cifar10, whose published weights load strictly.
Every ReLU is a module of its own, because the quantizer gives each its own range.
"""

from typing import Any, Literal

import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from qadtr_brevitas.models.classifier import CifarClassifier, cifar_cfg

Shortcut = Literal["A", "B"]
STAGE_CHANNELS = (16, 32, 64)


class PaddedShortcut(nn.Module):
    """Option A: every second pixel, and zero channels added on both sides; no parameters.

    Args:
        added_channels: how many zero channels, an even number.
    """

    def __init__(self, added_channels: int) -> None:
        super().__init__()
        self.padding = added_channels // 2

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, C + added_channels, ceil(H / 2), ceil(W / 2))."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


def _shortcut(in_channels: int, channels: int, kind: Shortcut) -> nn.Module:
    if in_channels == channels:
        return nn.Identity()
    if kind == "A":
        return PaddedShortcut(channels - in_channels)
    conv = nn.Conv2d(in_channels, channels, kernel_size=1, stride=2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm around a shortcut; halves the image where the channels change.

    Args:
        in_channels: channels of the input.
        channels: channels of the output.
        shortcut: how the input meets an output of another shape, option A or B of the paper.
    """

    def __init__(self, in_channels: int, channels: int, *, shortcut: Shortcut) -> None:
        super().__init__()
        stride = 1 if in_channels == channels else 2
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, shortcut)
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, in_channels, H, W) to (N, channels, H, W), or half of H and W where the channels change."""
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.act2(out + self.shortcut(x))


class CifarResNet(CifarClassifier):
    """ResNet of depth 6n+2 for 32x32 images.

    Args:
        depth: number of weight layers on the longest path: 20, 32, 44, 56, 110, ...
        shortcut: option A (zero-padded, as in the paper) or B (1x1 convolution and BatchNorm).
        num_classes: outputs; 0 for none, as in timm.
        in_chans: channels of the images.

    Raises:
        ValueError: a depth that is not 6n+2.
    """

    def __init__(self, depth: int, *, shortcut: Shortcut = "A", num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth {depth} is not possible: a CIFAR ResNet has 6n+2 layers, for instance 20 or 56")
        first, second, third = STAGE_CHANNELS
        self.conv1 = nn.Conv2d(in_chans, first, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.act1 = nn.ReLU()
        self.layer1 = _stage(first, first, blocks, shortcut)
        self.layer2 = _stage(first, second, blocks, shortcut)
        self.layer3 = _stage(second, third, blocks, shortcut)
        self.add_head(third, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Maps normalized images (N, in_chans, H, W) to features (N, 64, H / 4, W / 4)."""
        x = self.act1(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))


def _stage(in_channels: int, channels: int, blocks: int, shortcut: Shortcut) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, shortcut=shortcut)
    return nn.Sequential(first, *(BasicBlock(channels, channels, shortcut=shortcut) for _ in range(blocks - 1)))


DEPTHS = (8, 20, 32, 44, 56, 110)
default_cfgs = generate_default_cfgs(
    {f"cifar_resnet{depth}{suffix}": cifar_cfg("conv1") for depth in DEPTHS for suffix in ("", "b")}
)


def _create(variant: str, pretrained: bool, depth: int, shortcut: Shortcut, **kwargs: Any) -> CifarResNet:
    return build_model_with_cfg(CifarResNet, variant, pretrained, depth=depth, shortcut=shortcut, **kwargs)


@register_model
def cifar_resnet8(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-8 with option-A shortcuts, 0.08 M parameters: a third of ResNet-20's time, for trying things."""
    return _create("cifar_resnet8", pretrained, 8, "A", **kwargs)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20 with option-A shortcuts, 0.27 M parameters."""
    return _create("cifar_resnet20", pretrained, 20, "A", **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32 with option-A shortcuts, 0.46 M parameters."""
    return _create("cifar_resnet32", pretrained, 32, "A", **kwargs)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-44 with option-A shortcuts, 0.66 M parameters."""
    return _create("cifar_resnet44", pretrained, 44, "A", **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56 with option-A shortcuts, 0.85 M parameters."""
    return _create("cifar_resnet56", pretrained, 56, "A", **kwargs)


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-110 with option-A shortcuts, 1.7 M parameters."""
    return _create("cifar_resnet110", pretrained, 110, "A", **kwargs)


@register_model
def cifar_resnet8b(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-8 with option-B shortcuts."""
    return _create("cifar_resnet8b", pretrained, 8, "B", **kwargs)


@register_model
def cifar_resnet20b(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20 with option-B shortcuts."""
    return _create("cifar_resnet20b", pretrained, 20, "B", **kwargs)


@register_model
def cifar_resnet32b(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32 with option-B shortcuts."""
    return _create("cifar_resnet32b", pretrained, 32, "B", **kwargs)


@register_model
def cifar_resnet44b(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-44 with option-B shortcuts."""
    return _create("cifar_resnet44b", pretrained, 44, "B", **kwargs)


@register_model
def cifar_resnet56b(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56 with option-B shortcuts."""
    return _create("cifar_resnet56b", pretrained, 56, "B", **kwargs)


@register_model
def cifar_resnet110b(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-110 with option-B shortcuts."""
    return _create("cifar_resnet110b", pretrained, 110, "B", **kwargs)
