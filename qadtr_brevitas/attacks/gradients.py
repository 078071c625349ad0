"""Gradients as an attacker finds them: zero where a network cuts the way back."""

from __future__ import annotations

import torch
from torch import Tensor


def gradient_or_zero(
    outputs: Tensor, inputs: Tensor, weights: Tensor | None = None, *, keep_graph: bool = False
) -> Tensor:
    """Return the gradient of the weighted sum of outputs in inputs, in their shape.

    It is zero where the outputs do not depend on the inputs differentiably.

    Args:
        outputs: of any shape.
        inputs: of any shape.
        weights: of the outputs, in their shape; None for 1.
        keep_graph: whether other gradients of the same outputs follow.
    """
    if not outputs.requires_grad:
        return torch.zeros_like(inputs)
    weights = torch.ones_like(outputs) if weights is None else weights
    try:
        (gradient,) = torch.autograd.grad(
            outputs, inputs, weights, retain_graph=keep_graph, allow_unused=True, materialize_grads=True
        )
    except NotImplementedError:
        # What torch raises for an operation without a backward pass.
        return torch.zeros_like(inputs)
    return gradient
