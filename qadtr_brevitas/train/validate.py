"""Accuracy during training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from qadtr_brevitas.data.split import Split
from qadtr_brevitas.precision import Precision
from qadtr_brevitas.predict import predict
from qadtr_brevitas.quant import SwitchableModel, at_precision, frozen_weights


def accuracy_per_precision(
    model: SwitchableModel, split: Split, precisions: Sequence[Precision], accelerator: Accelerator
) -> dict[str, float]:
    """Share of images that are right at each precision, each process looking at its share of them.

    Args:
        model: left in training mode.
        split: the images.
        precisions: where to measure.
        accelerator: the processes.
    """
    own = split.subset(torch.arange(accelerator.process_index, len(split), accelerator.num_processes))
    right: list[Tensor] = []
    model.eval()
    with frozen_weights(model):
        for precision in precisions:
            with at_precision(model, precision):
                predicted = predict(model, own, device=accelerator.device)
            right.append((predicted == own.labels).sum())
    model.train()
    counts: Any = accelerator.reduce(torch.stack(right).to(accelerator.device), "sum")
    return {str(p): count / len(split) for p, count in zip(precisions, counts.tolist(), strict=True)}
