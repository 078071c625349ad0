from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.core.seeding import generator

CLASSES = 4
SIDE = 16


@dataclass(frozen=True)
class Toy:
    """A small trained network with its images: gratings of four directions, in noise."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def success_rate(self, patch: Patch, target: int | None, *, seed: int = 9) -> float:
        images, labels = self.test[0].float() / 255, self.test[1]
        with torch.no_grad():
            clean = self.model(images).argmax(1)
            patched = self.model(patch.apply(images, generator=generator(seed, "test"))).argmax(1)
        counts = clean == labels
        success = patched != labels
        if target is not None:
            counts &= labels != target
            success = patched == target
        return success[counts].float().mean().item()


@pytest.fixture(scope="session")
def toy() -> Toy:
    images, labels = gratings(1200, seed=0)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    draw = generator(0, "toy training")
    for _ in range(150):
        index = torch.randint(len(images), (64,), generator=draw)
        loss = nn.functional.cross_entropy(model(images[index].float() / 255), labels[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.eval()
    return Toy(model, images, labels, gratings(200, seed=1), gratings(400, seed=2))


def gratings(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Images (count, 3, 16, 16) uint8 and labels."""
    draw = generator(seed, "gratings")
    labels = torch.randint(CLASSES, (count,), generator=draw)
    angle = labels * torch.pi / CLASSES
    phase = torch.rand(count, generator=draw) * 2 * torch.pi
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    across = angle.cos()[:, None, None] * rows + angle.sin()[:, None, None] * columns
    waves = 0.5 + 0.15 * torch.sin(1.2 * across + phase[:, None, None])
    noisy = waves[:, None] + 0.08 * torch.randn(count, 3, SIDE, SIDE, generator=draw)
    return (noisy.clamp(0, 1) * 255).round().to(torch.uint8), labels
