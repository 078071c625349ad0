"""Networks for 32x32 images, registered with timm: ResNets (He et al. 2016) and VGGs with BatchNorm.

ResNets have 6n+2 layers in three stages of 16, 32 and 64 channels (section 4.2 of the paper). Their parameters are
named as in Y. Idelbayev's pytorch_resnet_cifar10, whose published weights load strictly. Every ReLU is a module of its
own, because the quantizer gives each its own range.

VGG-16 and -19 are configurations D and E (Simonyan and Zisserman 2015). The 4096-wide layers, made for 224x224 images,
are replaced by global average pooling and one linear layer.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn


class CifarClassifier(nn.Module):
    """A network that ends in global average pooling and one linear layer.

    A subclass sets up its layers, calls `add_head` and writes `forward_features`.
    """

    num_classes: int
    num_features: int
    classifier_name: ClassVar = "linear"
    """Attribute of the last layer, as in the published weights."""

    def add_head(self, num_features: int, num_classes: int) -> None:
        """Add pooling and classifier, and initialize every convolution for ReLU (He et al. 2015).

        Args:
            num_features: channels of the last feature map.
            num_classes: outputs; 0 for none, as in timm.
        """
        self.num_features = self.head_hidden_size = num_features
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map normalized images (N, 3, H, W) to the last feature map (N, num_features, h, w)."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map the last feature map to logits (N, num_classes), or to the pooled features (N, num_features)."""
        x = self.avgpool(x).flatten(1)
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalized images (N, 3, H, W) to logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return getattr(self, self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer by a new one, in place.

        Args:
            num_classes: outputs of the new layer; 0 for none.
            global_pool: only "avg", or None to keep it.

        Raises:
            ValueError: another kind of pooling.
        """
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool={global_pool!r} is not possible here: leave it out, or give 'avg'")
        self.num_classes = num_classes
        last = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        setattr(self, self.classifier_name, last)


def cifar_cfg(first_conv: str) -> dict[str, Any]:
    """Return timm's default_cfg of a CIFAR network; mean and std are those of the published weights.

    Y. Idelbayev's CIFAR-10 weights were trained with the ImageNet mean and std, not with CIFAR's own.
    """
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "first_conv": first_conv,
        "classifier": "linear",
    }


Shortcut = Literal["A", "B"]
RESNET_CHANNELS = (16, 32, 64)


class PaddedShortcut(nn.Module):
    """Option A: every second pixel, and zero channels added on both sides; no parameters.

    Args:
        added_channels: how many zero channels, an even number.
    """

    def __init__(self, added_channels: int) -> None:
        super().__init__()
        self.padding = added_channels // 2

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C + added_channels, ceil(H / 2), ceil(W / 2))."""
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
        """Map (N, in_channels, H, W) to (N, channels, H, W), or half of H and W where the channels change."""
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
        first, second, third = RESNET_CHANNELS
        self.conv1 = nn.Conv2d(in_chans, first, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.act1 = nn.ReLU()
        self.layer1 = _stage(first, first, blocks, shortcut)
        self.layer2 = _stage(first, second, blocks, shortcut)
        self.layer3 = _stage(second, third, blocks, shortcut)
        self.add_head(third, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map normalized images (N, in_chans, H, W) to features (N, 64, H / 4, W / 4)."""
        x = self.act1(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))


def _stage(in_channels: int, channels: int, blocks: int, shortcut: Shortcut) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, shortcut=shortcut)
    return nn.Sequential(first, *(BasicBlock(channels, channels, shortcut=shortcut) for _ in range(blocks - 1)))


VGG_CHANNELS = (64, 128, 256, 512, 512)


class CifarVgg(CifarClassifier):
    """VGG with BatchNorm for images of at least 32x32.

    Args:
        convolutions: number of 3x3 convolutions in each of the five stages; every stage ends by halving the image.
        num_classes: outputs; 0 for none, as in timm.
        in_chans: channels of the images.
    """

    def __init__(self, convolutions: tuple[int, ...], *, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for repeats, channels in zip(convolutions, VGG_CHANNELS, strict=True):
            for _ in range(repeats):
                # Without a bias, because the BatchNorm that follows would cancel it.
                conv = nn.Conv2d(in_chans, channels, kernel_size=3, padding=1, bias=False)
                layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
                in_chans = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.add_head(in_chans, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map normalized images (N, in_chans, H, W) to features (N, 512, H / 32, W / 32)."""
        return self.features(x)


DEPTHS = (8, 20, 32, 44, 56, 110)
default_cfgs = generate_default_cfgs(
    {
        **{f"cifar_resnet{depth}{suffix}": cifar_cfg("conv1") for depth in DEPTHS for suffix in ("", "b")},
        **{name: cifar_cfg("features.0") for name in ("cifar_vgg16", "cifar_vgg19")},
    }
)


def _create_resnet(variant: str, pretrained: bool, depth: int, shortcut: Shortcut, **kwargs: Any) -> CifarResNet:
    return build_model_with_cfg(CifarResNet, variant, pretrained, depth=depth, shortcut=shortcut, **kwargs)


@register_model
def cifar_resnet8(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-8 with option-A shortcuts, 0.08 M parameters: a third of ResNet-20's time, for experiments."""
    return _create_resnet("cifar_resnet8", pretrained, 8, "A", **kwargs)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20 with option-A shortcuts, 0.27 M parameters."""
    return _create_resnet("cifar_resnet20", pretrained, 20, "A", **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32 with option-A shortcuts, 0.46 M parameters."""
    return _create_resnet("cifar_resnet32", pretrained, 32, "A", **kwargs)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-44 with option-A shortcuts, 0.66 M parameters."""
    return _create_resnet("cifar_resnet44", pretrained, 44, "A", **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56 with option-A shortcuts, 0.85 M parameters."""
    return _create_resnet("cifar_resnet56", pretrained, 56, "A", **kwargs)


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-110 with option-A shortcuts, 1.7 M parameters."""
    return _create_resnet("cifar_resnet110", pretrained, 110, "A", **kwargs)


@register_model
def cifar_resnet8b(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-8 with option-B shortcuts."""
    return _create_resnet("cifar_resnet8b", pretrained, 8, "B", **kwargs)


@register_model
def cifar_resnet20b(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20 with option-B shortcuts."""
    return _create_resnet("cifar_resnet20b", pretrained, 20, "B", **kwargs)


@register_model
def cifar_resnet32b(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32 with option-B shortcuts."""
    return _create_resnet("cifar_resnet32b", pretrained, 32, "B", **kwargs)


@register_model
def cifar_resnet44b(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-44 with option-B shortcuts."""
    return _create_resnet("cifar_resnet44b", pretrained, 44, "B", **kwargs)


@register_model
def cifar_resnet56b(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56 with option-B shortcuts."""
    return _create_resnet("cifar_resnet56b", pretrained, 56, "B", **kwargs)


@register_model
def cifar_resnet110b(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-110 with option-B shortcuts."""
    return _create_resnet("cifar_resnet110b", pretrained, 110, "B", **kwargs)


def _create_vgg(variant: str, pretrained: bool, convolutions: tuple[int, ...], **kwargs: Any) -> CifarVgg:
    return build_model_with_cfg(CifarVgg, variant, pretrained, convolutions=convolutions, **kwargs)


@register_model
def cifar_vgg16(pretrained: bool = False, **kwargs: Any) -> CifarVgg:
    """VGG-16 with BatchNorm, 14.7 M parameters."""
    return _create_vgg("cifar_vgg16", pretrained, (2, 2, 3, 3, 3), **kwargs)


@register_model
def cifar_vgg19(pretrained: bool = False, **kwargs: Any) -> CifarVgg:
    """VGG-19 with BatchNorm, 20.0 M parameters."""
    return _create_vgg("cifar_vgg19", pretrained, (2, 2, 4, 4, 4), **kwargs)
