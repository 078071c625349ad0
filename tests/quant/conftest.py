"""A float network with statistics that are not the identity, and its switchable twin."""

import pytest
import torch
from torch import nn

from qadtr_brevitas.models.create import create_float_model
from qadtr_brevitas.quant import SwitchableModel, calibrate, convert

SIZE = (16, 16)


def randomize_norms(net: nn.Module) -> nn.Module:
    """Randomize the statistics and affine of every BatchNorm."""
    rng = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.running_mean, -0.2, 0.2), (module.running_var, 0.5, 2.0)):
                tensor.copy_(torch.rand(tensor.shape, generator=rng) * (high - low) + low)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=rng)
            nn.init.uniform_(module.bias, -0.2, 0.2, generator=rng)
    return net


@pytest.fixture(scope="session")
def float_net() -> nn.Module:
    """Return ResNet-20 in eval mode; tests must not change it."""
    torch.manual_seed(0)
    return randomize_norms(create_float_model("cifar_resnet20", num_classes=10)).eval()


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    """Return four images of noise, 16x16."""
    return torch.rand(4, 3, *SIZE, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def model(float_net: nn.Module, images: torch.Tensor) -> SwitchableModel:
    """Return the calibrated switchable ResNet-20 at 32 bit, in eval mode."""
    switchable = convert(float_net, image_size=SIZE)
    calibrate(switchable, [images])
    return switchable
