"""Adapters for attacks of other libraries: they leave no gradients on parameters and do not touch the global seed."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qadtr_brevitas.attacks.base import Model
from qadtr_brevitas.attacks.gradients import gradient_or_zero
from qadtr_brevitas.attacks.losses import check_target


class InputGradientModel(nn.Module):
    """A network as a module whose backward pass reaches the images and nothing else.

    Libraries call `loss.backward()`, which would leave gradients on every parameter.

    Args:
        model: the model under attack.
        target: class that the model must have, or None.
    """

    def __init__(self, model: Model, *, target: int | None = None) -> None:
        super().__init__()
        # Hidden from nn.Module, or a library that walks over parameters or calls train() would reach the network.
        self._call = (model,)
        self._target = target
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, C, H, W).

        Raises:
            UsageError: the model has no class `target`.
        """
        (model,) = self._call
        logits = _InputGradient.apply(images, model) if torch.is_grad_enabled() else model(images)
        if self._target is not None:
            check_target(self._target, classes=logits.shape[1])
        return logits


class _InputGradient(torch.autograd.Function):
    """A network's outputs, differentiable in its inputs only."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, model: Model) -> Tensor:
        with torch.enable_grad():
            ctx.images = images.detach().requires_grad_()
            ctx.logits = model(ctx.images)
        return ctx.logits.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        # FAB calls backward once for every class.
        gradient = gradient_or_zero(ctx.logits, ctx.images, grad_outputs[0], keep_graph=True)
        # Outputs that overflow have gradients that are not numbers, and a step along them would lose the image.
        return gradient.nan_to_num(0, 0, 0), None


@contextmanager
def seeded(generator: torch.Generator, device: torch.device) -> Generator[int]:
    """Seed the global random numbers from a generator within a block, and restore them; yields the seed."""
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield seed
