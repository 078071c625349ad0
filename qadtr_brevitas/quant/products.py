"""Quantized operands for products that a module computes itself: attention, standardized convolutions, einsums.

A product is a call of a function that multiplies and accumulates; its operands are what it multiplies. A module that
calls such functions in its own forward keeps that forward. Below 32 bit it runs under a `TorchFunctionMode` that
intercepts each product and passes quantized operands to it. At 32 bit nothing is intercepted, so the result is exact
and attention runs in PyTorch's fused kernel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.quant.switch import Switch

# Where an operand stands in a call: its label in this package, its position, and its name as a keyword argument.
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
# The weights of these have one row per output channel.
ROWS_ARE_CHANNELS = ("linear", "conv1d", "conv2d", "conv3d")
# Attention is one of these, or two matrix products.
PRODUCTS_OF_HEADS = (ATTENTION, "matmul")
# These multiply and accumulate inside a kernel, where operands cannot be quantized.
_RECURRENT = ("gru", "lstm", "rnn_relu", "rnn_tanh")
CLOSED = ("bilinear", "cdist", "dot", "vdot", *_RECURRENT, *(f"{name}_cell" for name in _RECURRENT))


def _unchecked(function: FunctionType) -> FunctionType:
    """Return a copy of a function that does not look for modes."""
    names = {**function.__globals__, "has_torch_function": lambda _: False}
    return FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)


# Written in Python and made of other functions, which have to be intercepted one by one.
_UNCHECKED: dict[Function, FunctionType] = {
    F.multi_head_attention_forward: _unchecked(F.multi_head_attention_forward),
}


def is_product(name: str, args: Sequence[Any]) -> bool:
    """Return whether a call of the function of this name multiplies and accumulates two operands or more."""
    return name in _PLACES or (name == _EINSUM and len(_einsum_operands(args)) > 1)


def is_sum(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call of the function of this name adds two tensors, in place or not.

    Sizes are tensors without dimensions while a network is traced, and sums of them are none of activations.
    """
    if name not in (SUM, "add_"):
        return False
    summands = [*args, *(kwargs[key] for key in ("other",) if key in kwargs)]
    return len(summands) == 2 and all(isinstance(x, Tensor) for x in summands) and any(x.dim() for x in summands)


def without_dispatch(function: Function) -> Function | None:
    """Return a copy of a composed function whose inner calls reach a mode one by one; None for any other function.

    PyTorch passes a composed function to a `TorchFunctionMode` as a whole, and would do so again each time the mode
    called it. The copy skips the check that does this.
    """
    return _UNCHECKED.get(function)


def operands(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the operands of a call by their labels, in the order of the call."""
    if name == _EINSUM:
        return {f"operand{index}": operand for index, operand in enumerate(_einsum_operands(args))}
    places = _SUMMANDS if name == SUM else _PLACES[name]
    return {label: args[at] if at < len(args) else kwargs[keyword] for label, at, keyword in places}


def call_with(
    new: Mapping[str, Tensor], function: Function, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Call a function with other operands and all other arguments unchanged."""
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


class QuantizedProduct(nn.Module):
    """A product with quantized operands.

    Args:
        function: name of the function.
        quantizers: a module for each operand to quantize, by the operand's label.
    """

    def __init__(self, function: str, quantizers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.function = function
        self.operands = nn.ModuleDict(quantizers)

    def quantized(self, label: str, x: Tensor) -> Tensor:
        """Return an operand, quantized if it has a quantizer."""
        return self.operands[label](x) if label in self.operands else x

    def forward(self, function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the function as the module called it, but with quantized operands."""
        found = operands(self.function, args, kwargs)
        new = {label: self.quantized(label, x) for label, x in found.items()}
        return call_with(new, function, self.function, args, kwargs)

    def extra_repr(self) -> str:
        return self.function


class QuantizedSum(QuantizedProduct):
    """A sum of two quantized tensors, so that hardware adds integers.

    Args:
        quantizers: a module for `both`, so that both have its levels, or for `left` and `right`; a side without one is
            quantized already. None at all if the sum stays float.
    """

    def __init__(self, quantizers: Mapping[str, nn.Module]) -> None:
        super().__init__(SUM, quantizers)

    def quantized(self, label: str, x: Tensor) -> Tensor:
        return super().quantized("both" if "both" in self.operands else label, x)

    def forward(self, function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        # An addition in place would overwrite what the quantizer keeps for its gradient.
        return super().forward(torch.add if self.operands else function, args, kwargs)


class QuantizedAttention(QuantizedProduct):
    """Scaled dot-product attention in two products, with the probabilities between them quantized as well."""

    def forward(self, function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Compute torch's scaled_dot_product_attention on quantized operands."""
        return self._attend(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        query, key = self.quantized("query", query), self.quantized("key", key)
        logits = (query * factor) @ key.transpose(-2, -1)
        if is_causal:
            attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            logits = logits + attn_mask
        probabilities = self.quantized("probabilities", logits.softmax(-1))
        if dropout_p:
            probabilities = F.dropout(probabilities, dropout_p)
        return probabilities @ self.quantized("value", value)


class ProductQuant(nn.ModuleList):
    """The quantized products of one module, in the order in which its forward computes them.

    Args:
        products: one for each product; those that stay float have no quantizers.
        switch: the model's switch; None if the products are quantized always, as in a frozen model.
    """

    def __init__(self, products: Iterable[QuantizedProduct], switch: Switch | None) -> None:
        super().__init__(products)
        self.switch = switch
        self.has_sums = any(isinstance(product, QuantizedSum) for product in self)

    @property
    def is_active(self) -> bool:
        """False at 32 bit, unless an observer is set."""
        switch = self.switch
        return switch is None or switch.observer is not None or not switch.precision.is_float


class _InterceptionPause(threading.local):
    """The depth of nested `products_not_intercepted` blocks in this thread."""

    depth = 0


_pause = _InterceptionPause()


@contextmanager
def products_not_intercepted() -> Generator[None]:
    """Keep products inside the block from being intercepted for an enclosing module."""
    _pause.depth += 1
    try:
        yield
    finally:
        _pause.depth -= 1


@contextmanager
def _pause_ended() -> Generator[None]:
    """Intercept products inside the block, though those of an enclosing module are not."""
    depth, _pause.depth = _pause.depth, 0
    try:
        yield
    finally:
        _pause.depth = depth


class _Interception(TorchFunctionMode):
    """Passes each product of a forward, in order, to the module that quantizes its operands."""

    def __init__(self, products: Iterator[QuantizedProduct], *, sums: bool) -> None:
        super().__init__()
        self._products = products
        self._sums = sums

    def __torch_function__(
        self, func: Function, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if _pause.depth:
            return func(*args, **kwargs)
        if (inside := without_dispatch(func)) is not None:
            with self:
                return inside(*args, **kwargs)
        if self._sums and is_sum(name, args, kwargs):
            name = SUM
        elif not is_product(name, args):
            return func(*args, **kwargs)
        product = next(self._products, None)
        if product is None or product.function != name:
            raise UsageError(
                f"the network calls {name} where it did not when it was converted: run it in the mode and with the "
                "image size that it was converted for"
            )
        with products_not_intercepted():
            return product(func, args, kwargs)


class QuantizedFunctions(nn.Module):
    """Mixin of modules that compute products in their own forward."""

    product_quant: ProductQuant

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Read outside of the blocks: torch.compile cannot trace `super()` within two of them (torch 2.14, Python 3.11).
        forward = super().forward
        if not self.product_quant.is_active:
            return forward(*args, **kwargs)
        products = iter(self.product_quant)
        with _pause_ended(), _Interception(products, sums=self.product_quant.has_sums):  # pyright: ignore[reportArgumentType]
            return forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Pickle finds the base class by its name, but not the class that is derived from it at run time.
        return _unfilled, (type(self).__mro__[2],), self.__getstate__()


def _unfilled(base: type[nn.Module]) -> nn.Module:
    """Return a module of the quantized class of a class, without any attribute."""
    quantized = _quantized_class(base)
    return quantized.__new__(quantized)


def quantize_products(module: nn.Module, products: ProductQuant) -> None:
    """Make a module compute its own products on quantized operands, in place; it keeps its name and attributes.

    Args:
        module: any module whose forward computes these products in this order.
        products: the modules that quantize their operands.
    """
    module.__class__ = _quantized_class(type(module))
    module.product_quant = products


def restore_products(module: QuantizedFunctions) -> None:
    """Undo `quantize_products`."""
    del module.product_quant
    module.__class__ = type(module).__mro__[2]


def exclude_products(layer: nn.Module) -> None:
    """Exclude the products of a layer from interception: a float layer, or a stock one with quantizers of its own.

    Switchable layers exclude theirs themselves.
    """
    layer.register_forward_pre_hook(_begin_pause)
    layer.register_forward_hook(_end_pause, always_call=True)


def _begin_pause(module: nn.Module, args: Any) -> None:
    _pause.depth += 1


def _end_pause(module: nn.Module, args: Any, y: Any) -> None:
    _pause.depth -= 1


@cache
def _quantized_class(base: type[nn.Module]) -> type[nn.Module]:
    return type(f"Quantized{base.__name__}", (QuantizedFunctions, base), {"__module__": base.__module__})
