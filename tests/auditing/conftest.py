"""A small trained network without tricks, and the images it is audited on."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from qadtr_brevitas.auditing.audited_model import AuditedModel, ModelToAudit, audited_models, evaluation_mode
from qadtr_brevitas.auditing.checks import CHECKS
from qadtr_brevitas.auditing.context import AuditContext
from qadtr_brevitas.auditing.finding import Finding
from qadtr_brevitas.auditing.profile import AuditProfile
from qadtr_brevitas.core.seeding import generator
from qadtr_brevitas.data.split import Split

CLASSES, SIDE = 5, 16

# The smallest sizes at which the checks tell the tests' networks apart.
SMALL = AuditProfile(steps=10, compared_steps=10, restarts=2, queries=100, noise_patches=2_000, directions=5, draws=5)


@dataclass(frozen=True)
class Trained:
    """A network in eval mode and test images that it knows."""

    net: nn.Module
    split: Split

    def context(self, audited: AuditedModel) -> AuditContext:
        """What the checks of a audited share, with small attacks."""
        batch, labels = self.split.batch(torch.arange(len(self.split)))
        return AuditContext(audited, SMALL, batch, labels, seed=0, batch_size=256)

    def findings(self, model: ModelToAudit, *ids: str, **others: object) -> dict[str, Finding]:
        """Some of the findings, at the model's first precision."""
        audited = audited_models(model, **others)[0]
        with evaluation_mode([model], device="cpu"):
            return run_checks(self.context(audited), *ids)


def run_checks(context: AuditContext, *ids: str) -> dict[str, Finding]:
    """Some of the findings."""
    return {check.id: check.run(context) for check in CHECKS if check.id in ids}


def train(net: nn.Module, *, seed: int = 0, steps: int = 150) -> nn.Module:
    """Trains a network on gratings and puts it in eval mode."""
    split = gratings(1500, seed=seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.005)
    draw = generator(seed, "training")
    for _ in range(steps):
        images, labels = split.batch(torch.randint(len(split), (64,), generator=draw))
        loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return net.eval()


def make_net(seed: int = 0) -> nn.Module:
    """A small network without max-pooling, whose patches always have a gradient."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 12, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * (SIDE // 4) ** 2, CLASSES),
    )


def gratings(count: int, *, seed: int) -> Split:
    """Waves of some directions in noise."""
    draw = generator(seed, "gratings")
    labels = torch.randint(CLASSES, (count,), generator=draw)
    angle = labels * torch.pi / CLASSES
    phase = torch.rand(count, generator=draw) * 2 * torch.pi
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    across = angle.cos()[:, None, None] * rows + angle.sin()[:, None, None] * columns
    waves = 0.5 + 0.15 * torch.sin(1.2 * across + phase[:, None, None])
    noisy = waves[:, None] + 0.08 * torch.randn(count, 3, SIDE, SIDE, generator=draw)
    return Split((noisy.clamp(0, 1) * 255).round().to(torch.uint8), labels, tuple(map(str, range(CLASSES))))


@pytest.fixture(scope="session")
def trained() -> Trained:
    return Trained(train(make_net()), gratings(200, seed=1))
