"""The training pass through torch.compile: one graph for each precision, and the eager pass for all else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qadtr_brevitas.core.device import has_compiler
from qadtr_brevitas.quant.compiled import allow_graphs

# Torch gives up on a function, and runs it eagerly, after so many graphs; some are for batches of other sizes.
_GRAPHS_EACH, _SPARE_GRAPHS = 2, 8


def compile_training(
    model: nn.Module, *, precisions: int, backend: str = "inductor"
) -> Callable[[Tensor], Tensor] | None:
    """Return a compiled form of a model for training passes; None if this machine has no C++ compiler.

    The first pass at each precision compiles its graph. It shares all parameters and buffers with the model, and its
    results are those of the model up to float rounding; layers that draw random numbers draw others. It may run inside
    DistributedDataParallel, which averages gradients as it does those of the model.

    Args:
        model: a switchable model.
        precisions: how many precisions are trained.
        backend: of torch.compile.
    """
    if backend == "inductor" and not has_compiler():
        return None
    allow_graphs(_GRAPHS_EACH * precisions + _SPARE_GRAPHS)
    config: Any = torch._dynamo.config  # pyright: ignore
    # Torch would cut graphs inside DistributedDataParallel where its buckets end, and cannot cut the autograd functions
    # of quantizers. Gradients are then sent after the backward pass, and not during it.
    config.optimize_ddp = False
    return torch.compile(model, backend=backend)
