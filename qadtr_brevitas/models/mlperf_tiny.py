"""The ResNet-8 of MLPerf Tiny's image classification (Banbury et al. 2021), registered with timm.

It takes pixels from 0 to 255 and pads as TensorFlow does: convolutions of stride 2 right and below only. Its
convolutions have biases, and those of the shortcuts no norm. Parameters are named `conv.0` to `conv.8`, `bn.0` to
`bn.6` and `fc`, in the order of the published network. The benchmark's accuracy is 85 % on CIFAR-10.
"""

from __future__ import annotations

from typing import Any, ClassVar

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from qadtr_brevitas.models.cifar import CifarClassifier

_CHANNELS = ((3, 16), (16, 16), (16, 16), (16, 32), (32, 32), (16, 32), (32, 64), (64, 64), (32, 64))
_SHORTCUTS, _STRIDED = (5, 8), (3, 6)
# What follows each convolution but the shortcuts.
_NORMS = (16, 16, 16, 32, 32, 64, 64)
_PIXELS = 255


class TinyResNet(CifarClassifier):
    """Three residual blocks for 32x32 images of pixels from 0 to 255.

    Args:
        num_classes: outputs; 0 for none, as in timm.
        in_chans: channels of the images.
    """

    classifier_name: ClassVar = "fc"

    def __init__(self, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.conv = nn.ModuleList(_convolution(number, in_chans) for number in range(len(_CHANNELS)))
        self.bn = nn.ModuleList(nn.BatchNorm2d(channels, eps=1e-3) for channels in _NORMS)
        self.act = nn.ModuleList(nn.ReLU() for _ in range(len(_NORMS)))
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.add_head(_NORMS[-1], num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (N, in_chans, H, W) of pixels from 0 to 255 to features (N, 64, H / 4, W / 4)."""
        conv, bn, act = self.conv, self.bn, self.act
        x = act[0](bn[0](conv[0](x)))
        x = act[2](x + bn[2](conv[2](act[1](bn[1](conv[1](x))))))
        x = act[4](conv[5](x) + bn[4](conv[4](act[3](bn[3](conv[3](self.pad(x)))))))
        return act[6](conv[8](x) + bn[6](conv[7](act[5](bn[5](conv[6](self.pad(x)))))))


def _convolution(number: int, in_chans: int) -> nn.Conv2d:
    inputs, outputs = _CHANNELS[number]
    inputs = in_chans if number == 0 else inputs
    if number in _SHORTCUTS:
        return nn.Conv2d(inputs, outputs, 1, stride=2)
    strided = number in _STRIDED
    return nn.Conv2d(inputs, outputs, 3, stride=2 if strided else 1, padding=0 if strided else 1)


default_cfgs = generate_default_cfgs(
    {
        "mlperf_tiny_resnet8": {
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "mean": (0.0, 0.0, 0.0),
            "std": (1 / _PIXELS,) * 3,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "first_conv": "conv.0",
            "classifier": "fc",
        }
    }
)


@register_model
def mlperf_tiny_resnet8(pretrained: bool = False, **kwargs: Any) -> TinyResNet:
    """ResNet-8 of MLPerf Tiny, 78,186 parameters, for weights of the benchmark."""
    return build_model_with_cfg(TinyResNet, "mlperf_tiny_resnet8", pretrained, **kwargs)
