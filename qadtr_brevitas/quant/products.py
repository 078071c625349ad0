"""The functions that multiply and accumulate, and where their operands stand in a call; and sums, where they count."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import FunctionType
from typing import Any

from torch import Tensor
from torch.nn import functional as F

# An operand: what it is called here, its position, and the name it has as a keyword argument.
Place = tuple[str, int, str]
Function = Callable[..., Any]

ATTENTION = "scaled_dot_product_attention"
SUM = "add"
_EINSUM = "einsum"
_LAYER: tuple[Place, ...] = (("input", 0, "input"), ("weight", 1, "weight"))
_SUMMANDS: tuple[Place, ...] = (("left", 0, "input"), ("right", 1, "other"))
_PLACES: dict[str, tuple[Place, ...]] = {
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d"), _LAYER),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _LAYER),
    "matmul": (("left", 0, "input"), ("right", 1, "other")),
    "__rmatmul__": (("right", 0, "input"), ("left", 1, "other")),
    "mm": (("left", 0, "input"), ("right", 1, "mat2")),
    "bmm": (("left", 0, "input"), ("right", 1, "mat2")),
    "mv": (("left", 0, "input"), ("right", 1, "vec")),
    "addmm": (("left", 1, "mat1"), ("right", 2, "mat2")),
    "baddbmm": (("left", 1, "batch1"), ("right", 2, "batch2")),
    "addbmm": (("left", 1, "batch1"), ("right", 2, "batch2")),
    ATTENTION: (("query", 0, "query"), ("key", 1, "key"), ("value", 2, "value")),
}
# These have a weight of one output channel a row.
ROWS_ARE_CHANNELS = ("linear", "conv1d", "conv2d", "conv3d")
# These multiply and accumulate inside, where nothing can be quantized.
_RECURRENT = ("gru", "lstm", "rnn_relu", "rnn_tanh")
CLOSED = ("bilinear", "cdist", "dot", "vdot", *_RECURRENT, *(f"{name}_cell" for name in _RECURRENT))
# Written in Python, of other functions; to be followed into.
_COMPOSED: dict[Function, FunctionType] = {F.multi_head_attention_forward: F.multi_head_attention_forward}


def is_product(name: str, args: Sequence[Any]) -> bool:
    """Whether a call of the function of this name multiplies and accumulates two operands or more."""
    return name in _PLACES or (name == _EINSUM and len(_einsum_operands(args)) > 1)


def is_sum(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of the function of this name adds two tensors, in place or not."""
    summands = [*args, *(kwargs[key] for key in ("other",) if key in kwargs)]
    return name in (SUM, "add_") and len(summands) == 2 and all(isinstance(x, Tensor) for x in summands)


@cache
def opened(function: Function) -> Function | None:
    """A function that computes the same and shows the functions that it calls, if it is made of some that matter.

    PyTorch hands a mode such a function as a whole, and would do so again each time the mode called it. This copy has
    no such check.
    """
    composed = _COMPOSED.get(function)
    if composed is None:
        return None
    unchecked = {**composed.__globals__, "has_torch_function": lambda _: False}
    return FunctionType(composed.__code__, unchecked, composed.__name__, composed.__defaults__, composed.__closure__)


def operands(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The operands of a call by what they are called here, in the order of the call."""
    if name == _EINSUM:
        return {f"operand{index}": operand for index, operand in enumerate(_einsum_operands(args))}
    places = _SUMMANDS if name == SUM else _PLACES[name]
    return {label: args[at] if at < len(args) else kwargs[keyword] for label, at, keyword in places}


def call_with(
    new: Mapping[str, Tensor], function: Function, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Calls the function with other operands and everything else as it was."""
    if name == _EINSUM:
        return function(args[0], *new.values(), **kwargs)
    positional, named = list(args), dict(kwargs)
    for label, at, keyword in _SUMMANDS if name == SUM else _PLACES[name]:
        if at < len(positional):
            positional[at] = new[label]
        else:
            named[keyword] = new[label]
    return function(*positional, **named)


def _einsum_operands(args: Sequence[Any]) -> Sequence[Tensor]:
    return args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
