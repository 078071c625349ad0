"""What a network does with one image: which layers run, in which order, and what feeds what."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qadtr_brevitas.errors import UsageError

ACTIVATIONS = (nn.ReLU, nn.ReLU6)
# Their output holds only values of their input (and zeros), so a quantized input stays quantized.
_VALUE_PRESERVING = (nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.Identity, nn.Dropout)
_VALUE_PRESERVING_FUNCTIONS = {"__getitem__", "pad", "_pad", "flatten", "reshape", "view", "contiguous", "max_pool2d"}
_SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__"}


@dataclass
class Call:
    """How one leaf module was used.

    Args:
        name: dotted module name.
        count: how often it was called.
        source: the activation module whose values are its input, possibly pooled or flattened; None if there is none.
        nonnegative_input: no input value was below 0.
        feeds_sum: an activation module whose output goes to a sum with another tensor: a residual stream.
    """

    name: str
    count: int = 0
    source: str | None = None
    nonnegative_input: bool = True
    feeds_sum: bool = False


@dataclass
class _Trace:
    calls: dict[str, Call] = field(default_factory=dict[str, Call])
    sources: dict[int, str] = field(default_factory=dict[int, str])
    # So that no id is used twice.
    alive: list[Tensor] = field(default_factory=list[Tensor])
    depth: int = 0

    def derive(self, x: Any, y: Any) -> None:
        """Notes that y holds values of x."""
        if isinstance(y, Tensor) and id(x) in self.sources:
            self.sources[id(y)] = self.sources[id(x)]
            self.alive.append(y)

    def leave(self, name: str, module: nn.Module, x: Tensor, y: Any) -> None:
        """Notes a call of a leaf module that has just returned."""
        call = self.calls.setdefault(name, Call(name))
        source = self.sources.get(id(x))
        call.source = source if call.count == 0 or source == call.source else None
        call.count += 1
        call.nonnegative_input &= bool((x >= 0).all())
        if type(module) in ACTIVATIONS:
            self.sources[id(y)] = name
            self.alive.append(y)
        elif isinstance(module, _VALUE_PRESERVING):
            self.derive(x, y)


class _Functions(TorchFunctionMode):
    """Watches what happens to activations between modules."""

    def __init__(self, trace: _Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        # Looked up before the call: a sum in place gives back the same tensor, with other values.
        operands = [self.trace.sources.get(id(x)) for x in args if isinstance(x, Tensor)]
        y = func(*args, **(kwargs or {}))
        if self.trace.depth == 0:
            if name in _SUMS and len(operands) > 1:
                for source in filter(None, operands):
                    self.trace.calls[source].feeds_sum = True
                self.trace.sources.pop(id(y), None)
            elif name in _VALUE_PRESERVING_FUNCTIONS:
                self.trace.derive(args[0], y)
        return y


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
    with _hooks(net, trace), torch.no_grad(), _Functions(trace):
        try:
            net(images)
        except (RuntimeError, ValueError, AssertionError) as error:
            size = "x".join(str(s) for s in images.shape[1:])
            raise UsageError(f"{type(net).__name__} does not run on an image of {size}: {error}") from error
    return trace.calls


@contextmanager
def _hooks(net: nn.Module, trace: _Trace) -> Generator[None]:
    was_training = {module: module.training for module in net.modules()}
    net.eval()
    handles = [
        handle
        for name, module in net.named_modules()
        if not any(True for _ in module.children())
        for handle in _watch(name, module, trace)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training in was_training.items():
            module.training = training


def _watch(name: str, module: nn.Module, trace: _Trace) -> tuple[Any, Any]:
    # What a model's own module computes, such as a shortcut that pads channels, is followed like code between modules.
    inside = int(type(module).__module__.startswith("torch.nn."))

    def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
        trace.depth += inside

    def leave(module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        if args:
            trace.leave(name, module, args[0], y)
        trace.depth -= inside

    return module.register_forward_pre_hook(enter), module.register_forward_hook(leave)
