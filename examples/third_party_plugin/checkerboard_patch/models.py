"""A network that qadtr-brevitas makes by the name `checkerboard_patch.models:tiny_net`."""

from torch import nn


def tiny_net(num_classes: int = 10, width: int = 8) -> nn.Module:
    """Return a network of two convolutions for images of 32x32 pixels.

    Args:
        num_classes: number of outputs; qadtr-brevitas passes the number of classes of the data set.
        width: channels of the first convolution; `model.args={width: 16}` in a recipe.
    """
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(32 * width, num_classes),
    )
