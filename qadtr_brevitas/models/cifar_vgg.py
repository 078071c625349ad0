"""VGG-16 and -19 with BatchNorm for 32x32 images (Simonyan and Zisserman 2015, configurations D and E).

The 4096-wide layers, made for 224x224 images, are replaced by global average pooling and one linear layer.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from qadtr_brevitas.models.classifier import CifarClassifier, cifar_cfg

STAGE_CHANNELS = (64, 128, 256, 512, 512)


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
        for repeats, channels in zip(convolutions, STAGE_CHANNELS, strict=True):
            for _ in range(repeats):
                # No bias: the BatchNorm that follows would take it out again.
                conv = nn.Conv2d(in_chans, channels, kernel_size=3, padding=1, bias=False)
                layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
                in_chans = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.add_head(in_chans, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Maps normalized images (N, in_chans, H, W) to features (N, 512, H / 32, W / 32)."""
        return self.features(x)


default_cfgs = generate_default_cfgs({name: cifar_cfg("features.0") for name in ("cifar_vgg16", "cifar_vgg19")})


def _create(variant: str, pretrained: bool, convolutions: tuple[int, ...], **kwargs: Any) -> CifarVgg:
    return build_model_with_cfg(CifarVgg, variant, pretrained, convolutions=convolutions, **kwargs)


@register_model
def cifar_vgg16(pretrained: bool = False, **kwargs: Any) -> CifarVgg:
    """VGG-16 with BatchNorm, 14.7 M parameters."""
    return _create("cifar_vgg16", pretrained, (2, 2, 3, 3, 3), **kwargs)


@register_model
def cifar_vgg19(pretrained: bool = False, **kwargs: Any) -> CifarVgg:
    """VGG-19 with BatchNorm, 20.0 M parameters."""
    return _create("cifar_vgg19", pretrained, (2, 2, 4, 4, 4), **kwargs)
