"""BatchNorm with running statistics per precision, and their recalibration.

A BatchNorm that all precisions share fails: its running statistics average over precisions that see different
activations (2 bit: accuracy falls from 62.7 % to 34.5 %). Statistics per precision cure this, and the affine may stay
shared. AdaBits, Any-Precision and DWQ keep a whole BatchNorm per precision: `norm="switchable"`.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import BatchNormAct2d, SyncBatchNormAct
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.modules import batchnorm
from torch.nn.modules._functions import SyncBatchNorm as SyncFunction

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import Precision, PrecisionLike
from qadtr_brevitas.data.batches import ImageBatches, Loader
from qadtr_brevitas.quant.switch import Switch, at_precision, evaluating, precisions_or_all
from qadtr_brevitas.quant.tensor_levels import Affine, Statistics

# The base class of BatchNorm1d, 2d and 3d has no public name.
BatchNorm = batchnorm._BatchNorm  # pyright: ignore[reportPrivateUsage]
# The norms that have a switchable form, by their exact classes.
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNormAct2d, SyncBatchNormAct)
# The statistics of a branch, and what a cumulative mean over all batches counts.
_COUNT = "num_batches_tracked"
_STATE = ("running_mean", "running_var", "weight", "bias", _COUNT)


class NormBranch(nn.Module):
    """Running statistics of one precision, with a weight and bias if each precision has its own affine."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor | None

    def __init__(self, norm: BatchNorm, *, own_affine: bool) -> None:
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self.register_buffer("running_mean", norm.running_mean.clone())
        self.register_buffer("running_var", norm.running_var.clone())
        self.weight = nn.Parameter(norm.weight.detach().clone()) if own_affine and norm.affine else None
        self.bias = nn.Parameter(norm.bias.detach().clone()) if own_affine and norm.affine else None
        counter = norm.num_batches_tracked if norm.momentum is None else None
        self.register_buffer(_COUNT, None if counter is None else counter.clone())
        self.register_load_state_dict_pre_hook(_add_count)


def _add_count(branch: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give the state of an older version, which counted no batches, the count that the branch has."""
    if isinstance(branch.num_batches_tracked, Tensor):
        state.setdefault(prefix + _COUNT, branch.num_batches_tracked)


class _Branches(nn.ModuleDict):
    """The branches of a norm, by precision."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        # As SyncBatchNorm.convert_sync_batchnorm does before it puts a norm of one precision in the place of this one.
        if name in self and self[name] is module:
            raise UsageError(
                "convert_sync_batchnorm would drop the norm statistics of each precision: call it on the float network "
                "and convert() that, whose norms are then averaged over the processes at every precision"
            )
        super().add_module(name, module)


class SwitchableBatchNorm(BatchNorm):
    """BatchNorm with running statistics, and optionally an affine, per precision.

    The 32-bit branch is the module itself, so float checkpoints load and 32 bit is exact. A training batch with one
    value per channel is normalized with the running statistics, which it leaves as they are.

    Args:
        norm: the float BatchNorm, for images or sequences, or timm's with an activation inside; its parameters and
            buffers are reused, and copied for every precision.
        switch: the model's switch.
        own_affine: whether each precision has a weight and bias of its own.
    """

    drop: nn.Module
    act: nn.Module

    def __init__(self, norm: BatchNorm, switch: Switch, *, own_affine: bool) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine)
        for name, value in norm.named_parameters(recurse=False):
            setattr(self, name, value)
        for name, value in norm.named_buffers(recurse=False):
            setattr(self, name, value)
        self.train(norm.training)
        self.float_class = type(norm)
        self.switch = switch
        # The group that averages statistics over processes, of a SyncBatchNorm.
        self.process_group: Any = getattr(norm, "process_group", None)
        self.averaged: int | None = None
        for name, module in norm.named_children():
            self.add_module(name, module)
        assert self.running_mean is not None
        self.branches = _Branches(
            {
                str(precision): NormBranch(self, own_affine=own_affine).to(self.running_mean.device)
                for precision in switch.allowed
                if not precision.is_float
            }
        )

    def branch(self, precision: Precision) -> SwitchableBatchNorm | NormBranch:
        """Return the module that holds the statistics of a precision: this one for 32 bit."""
        return self if precision.is_float else self.branches[str(precision)]  # pyright: ignore[reportReturnType]

    def at(self, precision: Precision) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return running mean, running variance, weight and bias of a precision, each (channels,)."""
        branch = self.branch(precision)
        weight = self.weight if branch.weight is None else branch.weight
        bias = self.bias if branch.bias is None else branch.bias
        assert branch.running_mean is not None
        assert branch.running_var is not None
        return branch.running_mean, branch.running_var, weight, bias

    def forward(self, input: Tensor) -> Tensor:  # named as in nn.BatchNorm2d
        now = self.switch.states.now
        if now.prepared is not None:
            y = self._normalized(input, now.prepared.norms[id(self)])
        elif now.folding is not None and self in now.folding.norms:
            y = input
        elif self.training and self._is_synchronized():
            y = self._synchronized(input)
        else:
            # One value per channel, as of a single image after a global pool, has no variance.
            measures = self.training and input.numel() > input.shape[1]
            share = self._share_of_batch() if measures else 0.0
            y = F.batch_norm(input, *self.at(now.precision), measures, share, self.eps)
        return self.act(self.drop(y)) if hasattr(self, "act") else y

    def affine_at(self, precision: Precision) -> Affine:
        """Return what the norm computes at a precision in evaluation mode."""
        mean, var, weight, bias = self.at(precision)
        scale = torch.rsqrt(var + self.eps) if weight is None else weight * torch.rsqrt(var + self.eps)
        return Affine(scale, -mean * scale if bias is None else bias - mean * scale)

    def _normalized(self, input: Tensor, fixed: Statistics | Affine | None) -> Tensor:
        if isinstance(fixed, Affine):
            return fixed.of(input)
        return input if fixed is None else F.batch_norm(input, *fixed, False, 0.0, self.eps)

    def _share_of_batch(self) -> float:
        """Return the weight of a training batch in the statistics, and count the batch."""
        if self.averaged is not None:
            self.averaged += 1
            return 1 / self.averaged
        if self.momentum is not None:
            return self.momentum
        counter = self.branch(self.switch.precision).num_batches_tracked
        assert counter is not None
        return 1 / int(counter.add_(1))

    def _is_synchronized(self) -> bool:
        if not issubclass(self.float_class, nn.SyncBatchNorm) or not (dist.is_available() and dist.is_initialized()):
            return False
        return dist.get_world_size(self.process_group or dist.group.WORLD) > 1

    def _synchronized(self, input: Tensor) -> Tensor:
        """Return the normalized batch, with statistics over the batches of all processes."""
        mean, var, weight, bias = self.at(self.switch.precision)
        group = self.process_group or dist.group.WORLD
        share, size = self._share_of_batch(), dist.get_world_size(group)
        return SyncFunction.apply(input, weight, bias, mean, var, self.eps, share, group, size)  # pyright: ignore

    def frozen(self) -> BatchNorm:
        """Return a norm of the float class with the statistics and affine of the current precision."""
        norm: BatchNorm = self.float_class(self.num_features, self.eps, self.momentum, self.affine)
        state = {**self.state_dict(), **self.branch(self.switch.precision).state_dict()}
        own = {name for name, _ in (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False))}
        norm.load_state_dict({name: value for name, value in state.items() if name in own}, strict=False)
        for name, module in self.named_children():
            if name != "branches":
                norm.add_module(name, module)
        return norm


def norms(model: nn.Module) -> list[SwitchableBatchNorm]:
    """Return every switchable norm layer of a model."""
    return [module for module in model.modules() if isinstance(module, SwitchableBatchNorm)]


def copy_float_statistics(model: nn.Module) -> None:
    """Copy the 32-bit statistics and affine of every norm to every other precision, in place."""
    with torch.no_grad():
        for norm in norms(model):
            for branch in norm.branches.values():
                for name in _STATE:
                    target = getattr(branch, name)
                    if target is not None:
                        target.copy_(getattr(norm, name))


@torch.inference_mode(False)
def recalibrate_norms(model: nn.Module, loader: Loader, *, precisions: Sequence[PrecisionLike] | None = None) -> None:
    """Measure the norm statistics of each precision again, as the mean over batches.

    Args:
        model: a switchable model; only running statistics change, in place.
        loader: batches of images as in `calibrate()`, drawn at random over all classes: batches sorted by class cost
            about 6 points of accuracy.
        precisions: the precisions to measure, 32 bit too if it is among them; None for all.

    Raises:
        UsageError: a precision is not allowed, or the model is not switchable.
        DataError: the loader has no images, or a batch is not images in [0, 1].
    """
    layers = norms(model)
    batches = ImageBatches(loader, device=next(model.parameters()).device)
    for precision in precisions_or_all(model, precisions):
        with evaluating(model), at_precision(model, precision), _averaging(layers):
            for images in batches:
                model(images)


@contextmanager
def _averaging(layers: Sequence[SwitchableBatchNorm]) -> Generator[None]:
    """Put norm layers in training mode, with the mean over all batches and calls as their statistics."""
    for layer in layers:
        layer.train()
        layer.averaged = 0
    try:
        yield
    finally:
        for layer in layers:
            layer.averaged = None
