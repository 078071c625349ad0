"""On how many levels a network's products compute: counted in the tensors that reach PyTorch's kernels.

This looks at the result from below, past modules, quantizers and interception alike: whatever way a convolution or a
matrix product was called, its operands end up in one of a few kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# The kernels that multiply and accumulate: positions of their operands.
_KERNELS: Mapping[Any, tuple[int, int]] = {
    aten.mm.default: (0, 1),
    aten.mv.default: (0, 1),
    aten.dot.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.addmv.default: (1, 2),
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
    aten.addbmm.default: (1, 2),
    aten.convolution.default: (0, 1),
}
# Kernels in which a whole layer computes, so that what is multiplied inside cannot be seen.
_CLOSED = ("attention", "encoder", "rnn", "lstm", "gru", "mkldnn", "mha", "cdist", "_trilinear")
# Rows of a weight that are looked at: all channels are quantized alike.
_ROWS = 64


@dataclass(frozen=True)
class Operand:
    """What a kernel was given.

    Args:
        shape: of the tensor.
        levels: how many distinct values it has, more than 257 counted as 257.
        row_levels: the most that one output channel has, if it is a weight.
        digest: equal for equal tensors.
    """

    shape: tuple[int, ...]
    levels: int
    row_levels: int
    digest: float


@dataclass(frozen=True)
class Seen:
    """A call of a kernel.

    Args:
        owner: dotted name of the innermost module.
        kernel: its name.
        operands: both; None for a kernel that cannot be looked into.
    """

    owner: str
    kernel: str
    operands: tuple[Operand, Operand] | None


class _Look(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.owners: list[str] = []
        self.seen: list[Seen] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func in _KERNELS:
            first, second = (args[position] for position in _KERNELS[func])
            self.seen.append(Seen(self.owners[-1], name, (_operand(first, None), _operand(second, func))))
        elif any(part in name for part in _CLOSED):
            self.seen.append(Seen(self.owners[-1], name, None))
        return func(*args, **(kwargs or {}))


def _operand(x: Tensor, weight_of: Any) -> Operand:
    levels = count_levels(x)
    rows = levels if weight_of is None or levels <= 2 else _levels_of_rows(_rows(weight_of, x))
    return Operand(tuple(x.shape), levels, rows, float(x.double().sum() + x.double().square().sum()))


def seen_levels(model: nn.Module, images: Tensor) -> tuple[Tensor, list[Seen]]:
    """Runs a model once and looks at every call of a kernel that multiplies and accumulates.

    Args:
        model: any model, in eval mode.
        images: (N, C, H, W).

    Returns:
        The model's output, and the calls in their order.
    """
    look = _Look()
    with _named(model, look.owners), torch.no_grad(), look:
        y = model(images)
    return y, look.seen


@contextmanager
def _named(model: nn.Module, owners: list[str]) -> Iterator[None]:
    """Keeps the names of the modules that run, innermost last."""

    def enter(name: str) -> Callable[..., None]:
        return lambda module, args: owners.append(name)

    def leave(module: nn.Module, args: Any, y: Any) -> None:
        owners.pop()

    handles: list[Any] = []
    for name, module in model.named_modules():
        handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def count_levels(x: Tensor, most: int = 257) -> int:
    """Number of distinct values of a tensor, counted no further than `most`.

    The values of a sample are looked for in all of it, and then those of a sample of what is left: sorting the whole
    tensor takes ten times as long.
    """
    rest, found = x.detach().reshape(-1), 0
    while rest.numel() and found < most:
        sample = rest[:: max(1, rest.numel() // 4096)][:4096].unique()
        found += sample.numel()
        if found >= most:
            break
        at = torch.bucketize(rest, sample).clamp_(max=sample.numel() - 1)
        rest = rest[sample[at] != rest]
    return min(found, most)


def _rows(kernel: Any, weight: Tensor) -> Tensor:
    """The second operand of a kernel with an output channel a row."""
    if kernel is aten.convolution.default:
        return weight.flatten(1)[:_ROWS]
    columns = weight if weight.dim() > 1 else weight[:, None]
    return columns.transpose(-2, -1).reshape(-1, columns.shape[-2])[:_ROWS]


def _levels_of_rows(rows: Tensor) -> int:
    values = rows.sort(1).values
    return 1 + int((values[:, 1:] != values[:, :-1]).sum(1).max())
