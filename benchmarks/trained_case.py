"""A network that is trained for some minutes on enlarged CIFAR-10: a judge of files where random weights are none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.benchmark_export import Case

if TYPE_CHECKING:
    from torch import Tensor, nn

_IMAGES, _BATCH = 6400, 64


def trained_case(name: str, count: int, *, side: int, steps: int, weights: Path) -> Case:
    """The network, trained briefly on enlarged images of CIFAR-10 if the file of its weights is not there, and images.

    Args:
        name: of timm, torchvision or this package.
        count: test images.
        side: of the images, in pixels.
        steps: of training.
        weights: file of the trained weights.
    """
    import torch
    from torch.nn import functional as F

    from qadtr_brevitas.core.registry import DATASETS
    from qadtr_brevitas.models.create import create_float_model

    data = DATASETS.load("cifar10")()

    def images_of(split: str, limit: int) -> tuple[Tensor, Tensor]:
        found = data.load(split, limit=limit, seed=0)
        images, labels = found.batch(torch.arange(len(found)))
        return F.interpolate(images, (side, side), mode="bilinear"), labels

    torch.manual_seed(0)
    net = create_float_model(name, num_classes=10, args={})
    if weights.is_file():
        net.load_state_dict(torch.load(weights, weights_only=True))
    else:
        _train(net, *images_of("train", _IMAGES), steps=steps)
        torch.save(net.state_dict(), weights)
    return Case(name, net.eval(), *images_of("test", count), is_published=True)


def _train(net: nn.Module, images: Tensor, labels: Tensor, *, steps: int) -> None:
    import torch
    from torch.nn import functional as F

    config: Any = net.pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, steps)
    net.train()
    for _ in range(steps):
        index = torch.randint(len(images), (_BATCH,))
        loss = F.cross_entropy(net((images[index] - mean) / std), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
