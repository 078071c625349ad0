"""Small networks with what FPGA compilers have to deal with, calibrated, and the images they see."""

from __future__ import annotations

import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.models.cifar import BasicBlock
from qadtr_brevitas.quant import calibrate, convert
from qadtr_brevitas.quant.model_info import ModelInfo

SIZE = (16, 16)
PIXELS = torch.randint(256, (12, 3, *SIZE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
SPLIT = Split(PIXELS, torch.arange(12) % 4, ("a", "b", "c", "d"))


def head(channels: int, pool: nn.Module) -> nn.Sequential:
    return nn.Sequential(pool, nn.Flatten(), nn.Linear(channels, 4))


def stem(channels: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(3, channels, 3, stride, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]


def residual(shortcut: str = "B") -> nn.Module:
    """A stem, a max pool that two layers read, a block that keeps its channels and one that doubles them."""
    blocks = [BasicBlock(8, 8, shortcut="B"), BasicBlock(8, 16, shortcut=shortcut)]
    return nn.Sequential(*stem(8), nn.MaxPool2d(2), *blocks, *head(16, nn.AdaptiveAvgPool2d(1)))


def plain() -> nn.Module:
    """VGG-like, with a bias and an average pool in the middle."""
    middle = [nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*stem(8), nn.MaxPool2d(2), *middle, *head(12, nn.AdaptiveAvgPool2d(1)))


class Inverted(nn.Module):
    """An inverted residual block of MobileNetV2 (Sandler et al. 2018) around its input."""

    def __init__(self, channels: int, expansion: int = 3) -> None:
        super().__init__()
        wide = channels * expansion
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Fire(nn.Module):
    """A module of SqueezeNet (Iandola et al. 2016): two branches that are concatenated."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Sequential(nn.Conv2d(channels, 4, 1), nn.ReLU())
        self.narrow = nn.Sequential(nn.Conv2d(4, channels // 2, 1), nn.ReLU())
        self.wide = nn.Sequential(nn.Conv2d(4, channels // 2, 3, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x)
        return torch.cat([self.narrow(x), self.wide(x)], 1)


def branching() -> nn.Module:
    """Two modules of SqueezeNet with a max pool between them."""
    return nn.Sequential(*stem(8), Fire(8), nn.MaxPool2d(2), Fire(8), *head(8, nn.AdaptiveAvgPool2d(1)))


class Mobile(nn.Module):
    """MobileNet-like: linear bottlenecks, depthwise convolutions, ReLU6 and a mean in the place of a pool."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        body = [Inverted(8) for _ in range(blocks)]
        self.features = nn.Sequential(*stem(8, stride=2), *body, nn.Conv2d(8, 16, 1), nn.ReLU6())
        self.classifier = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class Ported(nn.Module):
    """A block of a CIFAR ResNet, and what networks from TensorFlow have.

    Those pad unevenly with zeros, read what they pad without its border too, and compute sizes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pad, self.act = nn.Sequential(*stem(8)), nn.ZeroPad2d((0, 1, 0, 1)), nn.ReLU()
        self.block = BasicBlock(8, 8, shortcut="B")
        self.conv, self.shortcut = nn.Conv2d(8, 12, 3, 2), nn.Conv2d(8, 12, 1, 2)
        self.depthwise = nn.Sequential(Conv2dSame(12, 12, 3, 2, groups=12), nn.ReLU())
        self.head = head(12, nn.AdaptiveAvgPool2d(1))

    def forward(self, x: Tensor) -> Tensor:
        # The stem's output has two readers, one of them a sum.
        x = self.block(self.stem(x))
        x = self.act(self.conv(self.pad(x)) + self.shortcut(x))
        return self.head(self.depthwise(x))


def loaded(net: nn.Module, *, precisions: tuple[int, ...] = (32, 4, 2), **settings: object) -> LoadedModel:
    """A calibrated model of a network with BatchNorms that matter."""
    size = settings.pop("image_size", SIZE)
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    # Of another mean than 0.5, with which pixels would lie halfway between levels.
    statistics = {"mean": (0.48, 0.46, 0.41), "std": (0.23,) * 3}
    model = convert(net.eval(), precisions, image_size=size, **statistics, **settings)
    calibrate(model, [images_of(size)])
    info = ModelInfo(name="own", args={}, num_classes=4, image_size=size, classes=SPLIT.classes, quant={}, **statistics)
    return LoadedModel("own", model.eval(), "fingerprint", info)


def images_of(size: tuple[int, int]) -> Tensor:
    """The images of SPLIT in [0, 1], tiled or cut to a size."""
    images, _ = SPLIT.batch(torch.arange(len(SPLIT)))
    height, width = size
    return images.repeat(1, 1, -(-height // SIZE[0]), -(-width // SIZE[1]))[:, :, :height, :width].contiguous()
