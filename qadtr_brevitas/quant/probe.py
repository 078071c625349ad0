"""What a network does with one image: which layers run, in which order, and on what kind of input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qadtr_brevitas.errors import UsageError

ACTIVATIONS = (nn.ReLU, nn.ReLU6)
# Their output holds only values of their input, so a quantized input stays quantized.
_VALUE_PRESERVING = (nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.Identity, nn.Dropout)


@dataclass
class Call:
    """How one leaf module was used.

    Args:
        name: dotted module name.
        count: how often it was called.
        quantized_input: its input is a quantized activation, possibly pooled or flattened.
        nonnegative_input: no input value was below 0.
    """

    name: str
    count: int = 0
    quantized_input: bool = True
    nonnegative_input: bool = True


@dataclass
class _Trace:
    calls: dict[str, Call] = field(default_factory=dict)
    # Tensors are kept alive so that no id is used twice.
    quantized: dict[int, Tensor] = field(default_factory=dict)

    def record(self, name: str, module: nn.Module, x: Tensor, y: object) -> None:
        call = self.calls.setdefault(name, Call(name))
        call.count += 1
        call.quantized_input &= id(x) in self.quantized
        call.nonnegative_input &= bool((x >= 0).all())
        kept = isinstance(module, _VALUE_PRESERVING) and id(x) in self.quantized
        if isinstance(y, Tensor) and (kept or type(module) in ACTIVATIONS):
            self.quantized[id(y)] = y


def probe(net: nn.Module, images: Tensor) -> dict[str, Call]:
    """Runs the network once in eval mode and records every leaf module that is called, in order of execution.

    Args:
        net: a float network; its state is left as it was.
        images: (N, C, H, W), normalized.

    Returns:
        Calls by module name, in order of first use.

    Raises:
        UsageError: the network does not run on such images.
    """
    trace = _Trace()
    with _hooks(net, trace), torch.no_grad():
        try:
            net(images)
        except (RuntimeError, ValueError, AssertionError) as error:
            size = "x".join(str(s) for s in images.shape[1:])
            raise UsageError(f"{type(net).__name__} does not run on an image of {size}: {error}") from error
    return trace.calls


@contextmanager
def _hooks(net: nn.Module, trace: _Trace) -> Iterator[None]:
    was_training = {module: module.training for module in net.modules()}
    net.eval()
    handles = [
        module.register_forward_hook(
            lambda module, args, y, name=name: trace.record(name, module, args[0], y) if args else None
        )
        for name, module in net.named_modules()
        if not any(True for _ in module.children())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training in was_training.items():
            module.training = training
