"""ALRS: a learning rate of quantizer thresholds for each bit-width, from the size of their gradients."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from qadtr_brevitas.quant.switchable_quant import SwitchableQuant

_KEY = "alrs_bits_below"
# Gradients of thresholds count up to this size.
_CLIP = 1.0


def threshold_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return the thresholds of a model, those of each bit-width as one optimizer group, without any settings."""
    found: dict[int, list[nn.Parameter]] = defaultdict(list)
    for module in model.modules():
        if isinstance(module, SwitchableQuant):
            for name, threshold in module.thresholds.items():
                if threshold.requires_grad:
                    found[int(name)].append(threshold)
    highest = max(found, default=0)
    return [{"params": found[bits], _KEY: highest - bits} for bits in sorted(found, reverse=True)]


def adapt_learning_rates(optimizer: torch.optim.Optimizer) -> None:
    """Set the learning rates of the thresholds that have gradients, just before an SGD step (ALRS).

    Adaptive Learning Rate Scaling of Double Rounding (Huang et al. 2025, "Nearly Lossless Adaptive Bit Switching",
    arXiv 2502.01199): the thresholds t of all quantizers at b bit learn with the rate

        lr_b = eta_b * (lr - mean over quantizers of min(max |dL/dt|, 1, lr)),

    where lr is that of the weights, and eta_b is 1 at the highest bit-width and a tenth of that for every two bits
    less: the fewer the bits, the larger the gradients. What was decided here:

    - The paper learns steps, this package thresholds, the levels times the step. The rule is used on thresholds as it
      is. Converted to steps, which multiplies rates by the squared number of levels, it destroys the network: 10 %
      accuracy at 8 to 2 bit after 240 passes (CIFAR-10, ResNet-20, lr 0.02).
    - Odd differences of bit-widths have the geometric mean of their neighbors.

    Without the groups of `threshold_groups` nothing is done. The scheduler sets its own rates again after the step.

    Args:
        optimizer: SGD, with or without momentum; gradients are those of one batch, not scaled.
    """
    rate = optimizer.param_groups[0]["lr"]
    for group in optimizer.param_groups:
        sizes = [p.grad.abs().max() for p in group["params"] if p.grad is not None] if _KEY in group else []
        if sizes:
            taken = torch.stack(sizes).clamp(max=min(_CLIP, rate)).mean().item()
            group["lr"] = 10 ** (-group[_KEY] / 2) * (rate - taken) * group["lr_scale"]
