"""The order in which an epoch visits the images."""

import torch
from torch import Tensor

from qadtr_brevitas.seeding import generator


def epoch_order(count: int, *, seed: int, epoch: int) -> Tensor:
    """A random permutation of 0..count-1, int64, the same whenever seed and epoch are."""
    return torch.randperm(count, generator=generator(seed, "order", epoch))
