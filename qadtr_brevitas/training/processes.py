"""The processes of a run: how they start, what they have to agree on, and how they average losses and statistics."""

from __future__ import annotations

import atexit
import os
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from qadtr_brevitas.attacks.base import Memory
from qadtr_brevitas.config import TrainSection
from qadtr_brevitas.core.device import resolve_device
from qadtr_brevitas.core.errors import PluginError, TrainingError, UsageError
from qadtr_brevitas.core.extras import require
from qadtr_brevitas.training.objectives import Objective
from qadtr_brevitas.training.step import TrainingStep

if TYPE_CHECKING:
    from accelerate import Accelerator

_RUNNING_STATISTICS = ("running_mean", "running_var")
# Early releases of PyTorch have the option under its first name only.
_KNOWN_OPTIONS = signature(nn.parallel.DistributedDataParallel).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _KNOWN_OPTIONS else "broadcast_buffers"


@contextmanager
def started_processes(train: TrainSection, device: str) -> Generator[Accelerator]:
    """Join the processes that torchrun started, or run alone, with device and mixed precision set up.

    Raises:
        UsageError: accelerate is not installed, there is no such device, one GPU is named for several processes, fp16
            is wanted off a GPU, or the batch cannot be shared equally.
        TrainingError: the processes cannot reach each other, or another one has ended in the middle of the block.
    """
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    accelerator = _start_processes(train, device)
    try:
        yield accelerator
    except RuntimeError as error:
        if accelerator.num_processes == 1 or not _lost_connection(error):
            raise
        raise TrainingError(
            "another process of this training has ended: what is printed of it, or by torchrun, says why (code -9: "
            "killed, often for lack of memory). Give the same command again to resume after the last saved state"
        ) from error
    finally:
        # The caller ends a process group that the caller made. One that was made here serves the next run of these
        # processes, too: a second group would find the addresses of the first in torchrun's store.
        if not joined and accelerator.num_processes > 1:
            atexit.register(_end_group)


def _lost_connection(error: RuntimeError) -> bool:
    """Return whether a collective operation failed because a process is gone."""
    # Gloo has no exception of its own, only messages that begin with the place in its sources.
    return isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)


def _end_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _start_processes(train: TrainSection, device: str) -> Accelerator:
    require("accelerate", extra="train", purpose="training")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if ":" in device and "LOCAL_RANK" in os.environ:
        raise UsageError(f"device {device!r} is a single GPU, but torchrun gives each process its own: use cuda")
    wanted = resolve_device(device)
    if train.amp == "fp16" and wanted.type == "cpu":
        raise UsageError("train.amp=fp16 needs a GPU: give train.amp=bf16 or train.amp=no")
    if wanted.type == "cuda" and device != "auto":
        torch.cuda.set_device(wanted)
    # Accelerate keeps the first device and mixed precision of a process for good; another run of it may want others.
    AcceleratorState._reset_state(reset_partial_state=True)  # pyright: ignore[reportPrivateUsage]
    try:
        accelerator = Accelerator(cpu=wanted.type == "cpu", mixed_precision=train.amp)
    except RuntimeError as error:
        if not _lost_connection(error):
            raise
        raise TrainingError(
            f"the processes cannot reach each other ({str(error).splitlines()[0]}): GLOO_SOCKET_IFNAME or "
            "NCCL_SOCKET_IFNAME names the network interface to use; with torchrun --max-restarts, set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or restarted processes look for the addresses of the first ones"
        ) from error
    if train.batch_size % accelerator.num_processes:
        raise UsageError(
            f"train.batch_size={train.batch_size} cannot be shared equally by {accelerator.num_processes} processes: "
            "give a multiple of their number"
        )
    if train.batch_size // accelerator.num_processes % train.accumulate:
        raise UsageError(
            f"train.accumulate={train.accumulate} does not divide the "
            f"{train.batch_size // accelerator.num_processes} images of each process: give another number, or "
            "another train.batch_size"
        )
    return accelerator


def check_agreement(run: Path, found: tuple[int, bool, bool], accelerator: Accelerator) -> None:
    """Check that every process found the same state in the run directory; call it in all of them.

    Args:
        run: the directory.
        found: the step of the saved state or -1, whether the run is finished, and whether its model is there.
        accelerator: of this process.

    Raises:
        UsageError: they found different states, and would train different models.
    """
    own = torch.tensor([found], dtype=torch.int64, device=accelerator.device)
    everywhere = cast(Tensor, accelerator.gather(own))
    if (everywhere != everywhere[0]).any():
        steps = ", ".join("none" if step < 0 else str(step) for step in everywhere[:, 0].tolist())
        raise UsageError(
            f"the processes find different states in {run} (steps: {steps}): use a directory on a disk they share"
        )


class LossForward(nn.Module):
    """Computes an objective in its forward pass.

    DistributedDataParallel averages the gradients of one forward pass of the module it wraps. Wrapping the whole
    objective, and not the model, lets an objective run the model several times, at several precisions.

    Attributes:
        metrics: those of the last forward pass, detached.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.metrics: Mapping[str, float | Tensor] = {}

    def forward(self, objective: Objective, step: TrainingStep) -> Tensor:
        """Return the loss of an objective, 0-dim.

        Raises:
            PluginError: the loss is not 0-dim or has no gradient.
        """
        result = objective.compute(step)
        if result.loss.ndim or not result.loss.requires_grad:
            raise PluginError(
                f"objective {type(objective).__name__} returned a loss of shape {tuple(result.loss.shape)} with "
                f"requires_grad={result.loss.requires_grad}: it must be 0-dim and computed from the model's outputs"
            )
        # A metric with a graph would count as a result that a backward pass follows.
        self.metrics = {k: v.detach() if isinstance(v, Tensor) else v for k, v in result.metrics.items()}
        return result.loss


def replicate(forward: LossForward, accelerator: Accelerator) -> nn.Module:
    """Return a module that computes the same loss and averages the gradients over the processes, if there are several.

    Not `accelerator.prepare`, which would patch autocast into the forward pass for good.
    """
    if accelerator.num_processes == 1:
        return forward
    # A step at one precision leaves the thresholds of the others without a gradient. Norm statistics are averaged by
    # `average_norm_statistics`; DistributedDataParallel would copy those of rank 0.
    options: dict[str, Any] = {"find_unused_parameters": True, _SYNC_BUFFERS: False}
    device_ids = None if accelerator.device.type == "cpu" else [accelerator.device]
    return nn.parallel.DistributedDataParallel(forward, device_ids=device_ids, **options)


def averaged_gradients(forward: nn.Module, *, at_once: bool) -> AbstractContextManager[None]:
    """Return the context of one pass forward and back, whose gradients are averaged over the processes of a run.

    Args:
        forward: what `replicate` returned.
        at_once: average at the end of this pass, which the last of an update needs. Other passes add their gradients to
            those of this process, to be sent with those of the last.
    """
    if at_once or not isinstance(forward, nn.parallel.DistributedDataParallel):
        return nullcontext()
    return forward.no_sync()


def average_norm_statistics(model: nn.Module, accelerator: Accelerator) -> None:
    """Average the running norm statistics over all processes, in place, so that replicas stay equal."""
    buffers = [buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] in _RUNNING_STATISTICS]
    # Networks with LayerNorm have none.
    if accelerator.num_processes == 1 or not buffers:
        return
    flat: Any = accelerator.reduce(torch.cat([buffer.flatten() for buffer in buffers]), "mean")
    for buffer, part in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))


def gather_memory(memory: Memory, accelerator: Accelerator) -> Memory:
    """Return what the attack keeps in each process, (processes, ...); call it in all of them."""
    return {name: cast(Tensor, accelerator.gather(kept[None])) for name, kept in memory.items()}


def memory_of_rank(gathered: Memory, rank: int, device: torch.device) -> Memory:
    """Return one process's part of `gather_memory`; with more processes than then, some start with the same."""
    return {name: kept[rank % len(kept)].to(device) for name, kept in gathered.items()}
