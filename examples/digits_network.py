"""A small float network that knows handwritten digits: what the other examples start from."""

import timm
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from qadtr_brevitas.data.digits import Digits

MEAN, STD = (0.45, 0.45, 0.45), (0.25, 0.25, 0.25)


def train_network(net: nn.Module, *, steps: int) -> nn.Module:
    """Train as any PyTorch program does; the images are normalized here, by MEAN and STD."""
    images, labels = Digits().load("train").batch(torch.arange(1437))
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,))
        loss = cross_entropy(net((images[chosen] - MEAN[0]) / STD[0]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def digits_network(*, steps: int = 300) -> nn.Module:
    """Return a network that knows most digits after 300 steps."""
    torch.manual_seed(0)
    return train_network(timm.create_model("cifar_resnet8", num_classes=10), steps=steps)
