"""A float network that knows small digits, and loaders as a PyTorch program has them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from qadtr_brevitas.core.seeding import generator

CLASSES, SIDE = 4, 16


class TinyNet(nn.Module):
    """A network of the user's own: no timm name, no configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 12, 5, stride=2, padding=2),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 16, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).amax((2, 3)))


def waves(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Images (count, 3, 16, 16) in [0, 1] of waves in four directions, and labels."""
    draw = generator(seed, "waves")
    labels = torch.randint(CLASSES, (count,), generator=draw)
    angle = labels * torch.pi / CLASSES
    phase = torch.rand(count, generator=draw) * 2 * torch.pi
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    across = angle.cos()[:, None, None] * rows + angle.sin()[:, None, None] * columns
    pixels = 0.5 + 0.2 * torch.sin(1.2 * across + phase[:, None, None])
    noisy = pixels[:, None] + 0.05 * torch.randn(count, 3, SIDE, SIDE, generator=draw)
    # What an 8-bit file holds.
    return (noisy.clamp(0, 1) * 255).round() / 255, labels


def loader(count: int, *, seed: int) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*waves(count, seed=seed)), batch_size=64)


@pytest.fixture(scope="session")
def net() -> TinyNet:
    """The network after training: it knows nearly all test images."""
    torch.manual_seed(0)
    model = TinyNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    images, labels = waves(800, seed=0)
    draw = generator(0, "training")
    for _ in range(120):
        index = torch.randint(len(images), (64,), generator=draw)
        loss = cross_entropy(model(images[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model.eval()


@pytest.fixture(scope="session")
def test_loader() -> DataLoader[tuple[Tensor, ...]]:
    return loader(96, seed=1)
