"""One traced forward of a float network: which modules run, in which order, and the operands of every product."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.quant.products import ATTENTION, CLOSED, SUM, is_product, is_sum, operands, without_dispatch
from qadtr_brevitas.quant.provenance import IMAGE, Provenance, TensorFacts, tensors_in

ACTIVATIONS = (nn.ReLU, nn.ReLU6)


@dataclass
class Operand:
    """One operand of a product.

    Args:
        label: its label in the product: input, weight, left, query, ...
        shape: its shape for two images.
        origin: name of the activation module whose values it holds, IMAGE, or None.
        fixed: whether it is the same for every image: a weight, or computed from weights and constants.
        parameters: names of the parameters that it is computed from, if it is fixed.
        nonnegative: whether it cannot be negative.
        function: SOFTMAX or GELU if it holds the values of that function; None for any other.
        tensor: what tells the tensor from others of the forward; None if it is another one in each call.
    """

    label: str
    shape: tuple[int, ...]
    origin: str | None
    fixed: bool
    parameters: frozenset[str]
    nonnegative: bool
    function: str | None = None
    tensor: int | None = None

    def merge(self, other: Operand) -> None:
        """Keep the facts that hold in both calls."""
        self.origin = self.origin if self.origin == other.origin else None
        self.function = self.function if self.function == other.function else None
        self.tensor = self.tensor if self.tensor == other.tensor else None
        self.fixed &= other.fixed
        self.parameters = self.parameters | other.parameters if self.fixed else frozenset()
        self.nonnegative &= other.nonnegative


@dataclass
class Product:
    """A call, in a module's own forward, of a function that multiplies and accumulates, or of a sum that is quantized.

    Args:
        owner: dotted name of the module, "" for the network itself.
        name: name of the function.
        operands: the tensors that it multiplies or adds.
        macs: multiply-accumulates for one image, over all calls.
        is_first_or_last: whether it belongs to the first or last layers (`plan.mark_first_and_last`).
    """

    owner: str
    name: str
    operands: list[Operand]
    macs: int = 0
    is_first_or_last: bool = False

    @property
    def is_sum(self) -> bool:
        """Whether it is a sum of two tensors."""
        return self.name == SUM

    @property
    def is_constant(self) -> bool:
        """Whether its result is the same for every image, so that inference need not compute it."""
        return all(operand.fixed for operand in self.operands)


@dataclass
class Call:
    """The calls of one module.

    Args:
        name: dotted module name, "" for the network itself.
        count: number of calls.
        products: the products of its own forward, in order.
        feeds_sum: whether it is an activation module whose output is read by a sum, or by another function that is not
            a product and whose result has other levels: a residual stream, a concatenation, a gated branch.
    """

    name: str
    count: int = 0
    products: list[Product] = field(default_factory=list[Product])
    feeds_sum: bool = False
    feeds_end: bool = False


@dataclass
class Probe:
    """The record of one forward of a network.

    Args:
        calls: every module that was called, by name, in order of first use.
        products: every product, in order of first use; sums are only in `calls`.
        unseen_macs: multiply-accumulates, for one image, of functions that are not known as products.
        logits: the logits of the images, (N, classes).
        joined: sets of activation modules, by name, that are to have one quantizer, as their outputs are concatenated.
    """

    calls: dict[str, Call]
    products: list[Product]
    unseen_macs: int
    logits: Tensor
    joined: tuple[frozenset[str], ...] = ()

    def joined_with(self, name: str | None) -> frozenset[str]:
        """Return an activation module with those that it is joined with."""
        own = frozenset() if name is None else frozenset([name])
        return next((group for group in self.joined if own & group), own)


class _ProbeMode(TorchFunctionMode):
    """Follows tensors through functions, and records the products of each module."""

    def __init__(self, known: Provenance, images: int, *, sums: bool) -> None:
        super().__init__()
        self.known = known
        self.images = images
        self.sums = sums
        self.calls: dict[str, Call] = {}
        self.products: list[Product] = []
        self.seen_macs = 0
        self.counter = FlopCounterMode(display=False)
        # The modules that are running, innermost last: name and number of products so far.
        self.frames: list[tuple[str, Counter[str]]] = []
        self.joined: list[frozenset[str]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if (inside := without_dispatch(func)) is not None:
            with self:
                return inside(*args, **kwargs)
        facts = TensorFacts(self.known, func, args, kwargs)
        if name in CLOSED and not facts.is_fixed:
            self._refuse(name)
        before = self.counter.get_total_flops()
        y = func(*args, **kwargs)
        counted = (self.counter.get_total_flops() - before) // 2
        if name in CLOSED:
            # The same for every image, as the norm of a weight.
            self.seen_macs += counted
        if self.sums and is_sum(name, args, kwargs):
            self._note_product(SUM, operands(SUM, args, kwargs), 0)
        if is_product(name, args):
            self._note_product(name, operands(name, args, kwargs), counted)
        elif facts.result_needs_quantizing and any(True for _ in tensors_in([y])):
            for origin in facts.origins:
                if origin != IMAGE:
                    self.calls[origin].feeds_sum = True
        if facts.joined:
            self._join(frozenset(facts.joined))
        self.known.follow(facts, y)
        return y

    def _join(self, names: frozenset[str]) -> None:
        touched = [group for group in self.joined if group & names]
        self.joined = [group for group in self.joined if group not in touched] + [names.union(*touched)]

    def _refuse(self, name: str) -> NoReturn:
        owner = self.frames[-1][0]
        raise UsageError(
            f"{owner or 'the network'} calls {name}, whose multiply-accumulates cannot be followed, and would stay "
            "float: use layers of torch.nn without recurrence, or matmul"
        )

    def _note_product(self, name: str, found: dict[str, Tensor], counted: int) -> None:
        self.seen_macs += counted
        owner, counter = self.frames[-1]
        call = self.calls[owner]
        parts = [self._operand(label, x) for label, x in found.items()]
        index = counter.total()
        counter[name] += 1
        if index == len(call.products):
            call.products.append(Product(owner, name, parts))
            if name != SUM:
                self.products.append(call.products[index])
        product = call.products[index]
        if product.name != name or len(product.operands) != len(parts):
            raise UsageError(
                f"{owner or 'the network'} computes other products in one call than in another: "
                "split it into modules that compute the same in every call"
            )
        for own, other in zip(product.operands, parts, strict=True):
            own.merge(other)
        # FlopCounterMode has no count for some attention kernels.
        macs = _attention_macs(found) if name == ATTENTION else counted
        product.macs += macs // self.images

    def _operand(self, label: str, x: Tensor) -> Operand:
        known = self.known
        shape, origin, fixed = tuple(x.shape), known.origin(x), known.is_fixed(x)
        nonnegative, function = known.is_nonnegative(x), known.function(x)
        return Operand(label, shape, origin, fixed, known.parameters(x), nonnegative, function, known.key(x))

    def enter(self, name: str) -> None:
        """Record the start of a module's forward."""
        self.calls.setdefault(name, Call(name)).count += 1
        self.frames.append((name, Counter()))

    def leave(self, name: str, y: Any, *, activation: type[nn.Module] | None) -> None:
        """Record the end of the forward of a module, of an activation module's class if it is one."""
        self.frames.pop()
        if activation is not None:
            self.known.mark(y, name, activation)


def probe(
    net: nn.Module, images: Tensor, *, nonnegative: bool = False, sums: bool = False, joins: bool = False
) -> Probe:
    """Run a network once in eval mode and record every module that is called and every product.

    Args:
        net: a float network; its modes and state are restored.
        images: (N, C, H, W), normalized.
        nonnegative: whether normalized images are never negative.
        sums: whether sums of two tensors are recorded as products as well.
        joins: whether activation modules whose outputs are concatenated are to have one quantizer.

    Raises:
        UsageError: the network does not run on such images, does not return logits (N, classes), a module computes
            other products in each call, or multiplies in a function that cannot be followed.
    """
    known = Provenance(net, images, nonnegative_image=nonnegative, joins=joins)
    watch = _ProbeMode(known, len(images), sums=sums)
    with _hooks(net, watch), torch.no_grad(), watch.counter, watch:
        try:
            y = net(images)
        except (RuntimeError, ValueError, AssertionError, TypeError, IndexError, KeyError) as error:
            size = "x".join(str(s) for s in images.shape[1:])
            raise UsageError(
                f"{type(net).__name__} does not run on an image of {size}: {error}{_own_size(net, images)}"
            ) from error
    unseen = watch.counter.get_total_flops() // 2 - watch.seen_macs
    logits = _checked_logits(net, images, y)
    return Probe(watch.calls, watch.products, unseen // len(images), logits, tuple(watch.joined))


def _checked_logits(net: nn.Module, images: Tensor, y: Any) -> Tensor:
    kind = type(net).__name__
    if not isinstance(y, Tensor):
        raise UsageError(
            f"{kind} returns {type(y).__name__}, not logits (N, classes): wrap it so that it returns the logits alone"
            + (" (without features_only)" if isinstance(y, list) else "")
        )
    if y.ndim != 2 or len(y) != len(images) or not y.is_floating_point():
        raise UsageError(
            f"{kind} returns {tuple(y.shape)} for {len(images)} images: it must return logits of the shape (N, classes)"
        )
    if getattr(net, "num_classes", None) == 0:
        raise UsageError(f"{kind} has no classifier (num_classes=0) and returns features: make it with num_classes=N")
    return y


def _own_size(net: nn.Module, images: Tensor) -> str:
    own = (getattr(net, "pretrained_cfg", None) or {}).get("input_size")
    if own is None or tuple(own) == tuple(images.shape[1:]):
        return ""
    return f". It is made for images of {'x'.join(str(side) for side in own)}: use some of about that size"


def _attention_macs(found: dict[str, Tensor]) -> int:
    query, key, value = (found[label].shape for label in ("query", "key", "value"))
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


@contextmanager
def _hooks(net: nn.Module, watch: _ProbeMode) -> Generator[None]:
    was_training = {module: module.training for module in net.modules()}
    trainable = [parameter for parameter in net.parameters() if parameter.requires_grad]
    net.eval()
    # FlopCounterMode fails if a parameter that requires a gradient is passed to a module without recording one.
    for parameter in trainable:
        parameter.requires_grad_(False)
    handles = [handle for name, module in net.named_modules() for handle in _watch(name, module, watch)]
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()
        for module, training in was_training.items():
            module.training = training


def _watch(name: str, module: nn.Module, watch: _ProbeMode) -> Sequence[Any]:
    # A hook may replace the output of an activation by anything.
    is_activation = type(module) in ACTIVATIONS and not module._forward_hooks  # pyright: ignore[reportPrivateUsage]
    activation = type(module) if is_activation else None

    def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
        watch.enter(name)

    def leave(_: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        watch.leave(name, y, activation=activation)

    return module.register_forward_pre_hook(enter), module.register_forward_hook(leave)
