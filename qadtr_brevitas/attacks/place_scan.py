"""Where a patch could do the most, by the gradient of the loss in the image: all places for one backward pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from qadtr_brevitas.attacks.descent import input_gradients
from qadtr_brevitas.attacks.per_image import PatchTask
from qadtr_brevitas.attacks.relocation import AllowedCorners
from qadtr_brevitas.attacks.results import AttackResult


def first_order_gains(task: PatchTask) -> tuple[Tensor, AttackResult]:
    """Return how much the best patch at each place lowers the loss to first order, and the images without a patch.

    Returns:
        Gains (N, rows, columns), one for each corner, and the result of the images as they are.
    """
    images = task.images.detach().requires_grad_()
    with torch.enable_grad():
        clean = task.judge(images)
        (gradients,) = input_gradients(clean.losses, [images])
    # The best value of a pixel is 0 where its gradient is positive, and 1 where it is negative.
    gains = torch.where(gradients > 0, gradients * task.images, gradients * (task.images - 1)).sum(1, keepdim=True)
    return conv2d(gains, task.mask[None, None].to(gains))[:, 0], clean.detach()


def best_corners(gains: Tensor, count: int, *, allowed: AllowedCorners, apart: tuple[int, int]) -> list[Tensor]:
    """Return corners (N, 2) of the largest gains (N, rows, columns), which lie `apart` rows or columns or more."""
    gains = gains.masked_fill(~allowed.allowed.to(gains.device), -torch.inf)
    rows = torch.arange(gains.shape[1], device=gains.device)
    columns = torch.arange(gains.shape[2], device=gains.device)
    found: list[Tensor] = []
    for _ in range(count):
        best = gains.flatten(1).argmax(1)
        row, column = best // gains.shape[2], best % gains.shape[2]
        found.append(torch.stack([row, column], 1))
        near_rows = (rows - row[:, None]).abs() < apart[0]
        near_columns = (columns - column[:, None]).abs() < apart[1]
        near = near_rows[:, :, None] & near_columns[:, None, :]
        gains = gains.masked_fill(near, -torch.inf)
    return found
