"""The training pass through torch.compile: one graph for each precision, and the eager pass for all else."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qadtr_brevitas.config import TrainSection
from qadtr_brevitas.core.device import missing_compiler
from qadtr_brevitas.quant.compiled import allow_graphs, compile_passes, graph_count, reason_of
from qadtr_brevitas.quant.model import SwitchableModel
from qadtr_brevitas.training.step import FLOAT

# Torch gives up on a function, and runs it eagerly, after so many graphs; some are for batches of other sizes.
_GRAPHS_EACH, _SPARE_GRAPHS = 2, 8


def compile_run(
    model: SwitchableModel, train: TrainSection, *, report: Callable[[str], None]
) -> Callable[[Tensor], Tensor] | None:
    """Compile passes of attacks and of training if a recipe asks for it, and return the form of those of training.

    Args:
        model: a switchable model.
        train: of the recipe.
        report: called with a sentence on each compilation, and on the reason where the compiler fails.
    """
    if train.compile is not True:
        return None
    drawn = {*train.precision.possible(), *([FLOAT] if train.float_epochs else [])}
    compiled = compile_training(model, precisions=len(drawn), report=report)
    if compiled is not None:
        compile_passes(model, report=report)
    return compiled


def compile_training(
    model: SwitchableModel,
    *,
    precisions: int,
    report: Callable[[str], None] | None = None,
    backend: str | Callable[..., Any] = "inductor",
) -> Callable[[Tensor], Tensor] | None:
    """Return a compiled form of a model for training passes; None if this machine has no compiler for its device.

    The first pass at each precision compiles its graph. It shares all parameters and buffers with the model, and its
    results are those of the model up to float rounding; layers that draw random numbers draw others. It may run inside
    DistributedDataParallel, which averages gradients as it does those of the model. Where the compiler fails, this and
    all later passes are those of the model.

    Args:
        model: a switchable model.
        precisions: how many precisions are trained.
        report: called with a sentence on each compilation, and on the reason where the compiler fails.
        backend: of torch.compile.
    """
    if backend == "inductor" and missing_compiler(model.mean.device):
        return None
    allow_graphs(_GRAPHS_EACH * precisions + _SPARE_GRAPHS)
    config: Any = torch._dynamo.config  # pyright: ignore
    # Torch would cut graphs inside DistributedDataParallel where its buckets end, and cannot cut the autograd functions
    # of quantizers. Gradients are then sent after the backward pass, and not during it.
    config.optimize_ddp = False
    return _CompiledTraining(model, report or (lambda message: None), backend)


class _CompiledTraining:
    """The compiled form of one model, until the compiler fails.

    Args:
        model: the model.
        report: called with sentences for people.
        backend: of torch.compile.
    """

    def __init__(
        self, model: SwitchableModel, report: Callable[[str], None], backend: str | Callable[..., Any]
    ) -> None:
        self._model, self._report = model, report
        self._graph = torch.compile(model, backend=backend)
        self._tried: set[object] = set()
        self._is_working = True

    def __call__(self, images: Tensor) -> Tensor:
        if not self._is_working:
            return self._model(images)
        kind = (
            self._model.switch.precision,
            images.shape,
            images.stride(),
            torch.is_autocast_enabled(images.device.type),
        )
        if kind not in self._tried:
            if failure := self._try(images):
                return self._give_up(images, failure)
            self._tried.add(kind)
        return self._graph(images)

    def _try(self, images: Tensor) -> Exception | None:
        """Compile the graphs of both ways, and return the error if that fails; afterwards all is as before."""
        before, start = graph_count(), time.perf_counter()
        buffers = [(buffer, buffer.detach().clone()) for buffer in self._model.buffers()]
        parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        try:
            with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
                # The way back is compiled when it is first taken. Not backward(): DistributedDataParallel would wait
                # for the gradients of other processes.
                torch.autograd.grad(self._graph(images).sum(), parameters, allow_unused=True)
        except Exception as error:
            return error
        finally:
            for buffer, values in buffers:
                # Not a change that autograd sees: it keeps statistics of norms for passes that are still to go back.
                buffer.data.copy_(values)
        if graph_count() > before:
            precision, seconds = self._model.switch.precision, time.perf_counter() - start
            self._report(f"compiled the passes of training at {precision} bit in {seconds:.0f} s")
        return None

    def _give_up(self, images: Tensor, failure: Exception) -> Tensor:
        # Images that the network itself cannot take are no fault of the compiler.
        logits = self._model(images)
        self._is_working = False
        self._report(f"training goes on without train.compile: torch.compile fails ({reason_of(failure)})")
        return logits
