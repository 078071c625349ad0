"""Blocks of a network, whose outputs are reconstructed together: residual blocks, transformer blocks, single layers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qadtr_brevitas.core.precision import FLOAT_BITS, Precision
from qadtr_brevitas.quant.layers import SwitchableLayer, switchable_layers
from qadtr_brevitas.quant.products import products_not_intercepted
from qadtr_brevitas.quant.switch import at_precision

_FLOAT = Precision(FLOAT_BITS, FLOAT_BITS)
# Images of one step: more make no better gradient and take more memory.
_IMAGES = 32


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """Return the blocks of a network: items of its lists and sequences with several layers, and layers outside of them.

    Of items within items, the innermost are blocks. Each layer belongs to one block, or to several if it is shared.

    Args:
        net: a converted network.
    """
    blocks = [block for block in _items(net) if len(switchable_layers(block)) > 1]
    blocks = [block for block in blocks if not any(other is not block and _holds(block, other) for other in blocks)]
    inside = {layer for block in blocks for layer in switchable_layers(block).values()}
    return [*blocks, *(layer for layer in switchable_layers(net).values() if layer not in inside)]


def _items(net: nn.Module) -> list[nn.Module]:
    """Return the items of lists and sequences that are no such containers themselves."""
    containers = [module for module in net.modules() if isinstance(module, nn.Sequential | nn.ModuleList)]
    items = [item for container in containers for item in container.children()]
    found = [item for item in items if not isinstance(item, nn.Sequential | nn.ModuleList | SwitchableLayer)]
    return list(dict.fromkeys(found))


def _holds(module: nn.Module, other: nn.Module) -> bool:
    return any(each is other for each in module.modules())


@dataclass
class Call:
    """One call of a block on some images.

    Attributes:
        args: the positional arguments; tensors come from the layers before at the precision of the reconstruction.
        kwargs: the named arguments.
        output: what the float network returns.
        images: the number of images.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    images: int

    def run(self, block: nn.Module) -> Tensor:
        """Return what the block returns for these arguments, which it may change in place without harm."""
        return block(*_copied(self.args), **{name: _copied(value) for name, value in self.kwargs.items()})


class _Reached(Exception):
    """Ends a forward pass."""


def order_of_calls(model: nn.Module, blocks: Iterable[nn.Module], images: Tensor) -> list[nn.Module]:
    """Return the blocks that run exactly once and return one tensor, in order."""
    calls: dict[nn.Module, int] = {}
    single: set[nn.Module] = set()

    def note(block: nn.Module, _: object, output: object) -> None:
        calls[block] = calls.get(block, 0) + 1
        if isinstance(output, Tensor):
            single.add(block)

    begun: list[nn.Module] = []
    handles = [block.register_forward_hook(note) for block in blocks]
    handles += [block.register_forward_pre_hook(lambda block, _: begun.append(block)) for block in blocks]
    with _removing(handles), torch.no_grad():
        model(images)
    return [block for block in dict.fromkeys(begun) if calls.get(block) == 1 and block in single]


@torch.no_grad()
def calls_of(
    model: nn.Module,
    block: nn.Module,
    precision: Precision,
    batches: Iterable[Tensor],
    count_batch: Callable[[], object],
) -> list[Call]:
    """Return what a block is given at a precision, and what it returns in the float network, on all images.

    Args:
        model: a switchable model, in eval mode.
        block: a block that runs once in a forward pass.
        precision: a precision below 32.
        batches: images (n, C, H, W) in [0, 1].
        count_batch: called after each batch.
    """
    found: list[Call] = []
    for batch in batches:
        for images in batch.split(_IMAGES):
            args, kwargs = _reached(model, block, precision, images)[:2]
            found.append(Call(args, kwargs, _reached(model, block, _FLOAT, images)[2], len(images)))
        count_batch()
    return found


def _reached(
    model: nn.Module, block: nn.Module, precision: Precision, images: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """Return the arguments and the output of a block in a forward pass, which ends there."""
    seen: list[Any] = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The block may work in place on what it is given.
        seen.extend((_copied(args), {name: _copied(value) for name, value in kwargs.items()}))

    def leave(_: nn.Module, args: object, output: Tensor) -> None:
        seen.append(output.detach())
        raise _Reached

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]
    with _removing(handles), at_precision(model, precision), suppress(_Reached):
        model(images)
    args, kwargs, output = seen
    return args, kwargs, output


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        with products_not_intercepted():
            return value.detach().clone()
    return tuple(map(_copied, value)) if isinstance(value, tuple) else value  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


@contextmanager
def _removing(handles: list[Any]) -> Generator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
