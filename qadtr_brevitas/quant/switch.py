"""The current precision of a switchable model, in one object that every quantizer and norm layer reads."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import FLOAT_BITS, Precision, PrecisionLike, parse_precisions

# Called with a quantizer (SwitchableQuant) and the float tensor that it would quantize.
Observer = Callable[[Any, Tensor], None]


class Folding(Protocol):
    """BatchNorms folded into convolutions while patches are made (`quant.folding.folded_norms`)."""

    @property
    def norms(self) -> frozenset[nn.Module]:
        """The folded norms, which return their input."""
        ...

    @property
    def in_place(self) -> bool:
        """Whether ReLUs work in place."""
        ...

    def weights(self, conv: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return weights (out, in / groups, height, width) and bias (out,) of a convolution with its norm folded in."""
        ...

    def arithmetic(self, images: Tensor) -> AbstractContextManager[Any]:
        """Return the context that a forward over images runs in, at the current precision."""
        ...


class Switch:
    """The current precision and the weights quantized for it, shared by all layers of one model.

    This is a plain object, not a module: setting one attribute switches the whole network, whatever its size, and
    `copy.deepcopy` of a model copies the switch with it.

    Args:
        precisions: the allowed precisions; the first one is the current one at the start.

    Attributes:
        frozen: weights quantized within `frozen_weights`, by quantizer and bit-width; None outside.
        observer: called by each quantizer instead of quantizing, with the tensor, which passes unchanged.
        folding: the norms folded into convolutions; None if none are.
        images: number of images in the batch that is running.
    """

    def __init__(self, precisions: Sequence[Precision]) -> None:
        self.allowed = tuple(precisions)
        self.precision = self.allowed[0]
        self.frozen: dict[tuple[int, int], tuple[Tensor, ...]] | None = None
        self.observer: Observer | None = None
        self.folding: Folding | None = None
        self.images = 1

    def set(self, precision: PrecisionLike) -> None:
        """Switch to a precision.

        Raises:
            UsageError: the precision is not among the allowed ones.
        """
        wanted = Precision.parse(precision)
        if wanted not in self.allowed:
            names = ", ".join(str(p) for p in self.allowed)
            raise UsageError(f"this model has no precision {wanted}: it was converted for {names}")
        self.precision = wanted


def switch_of(model: nn.Module) -> Switch:
    """Return the switch of a switchable model, also through wrappers such as DistributedDataParallel.

    Raises:
        UsageError: the model was not converted.
    """
    for module in model.modules():
        if isinstance(switch := getattr(module, "switch", None), Switch):
            return switch
    raise UsageError(f"{type(model).__name__} is not a switchable model: call convert() on it first")


def set_precision(model: nn.Module, precision: PrecisionLike) -> None:
    """Switch the model in place: every quantizer and norm layer at once, in microseconds.

    Raises:
        UsageError: the precision is not allowed (the allowed ones are named), or the model is not switchable.
    """
    switch_of(model).set(precision)


def get_precision(model: nn.Module) -> Precision:
    """Return the current precision.

    Raises:
        UsageError: the model is not switchable.
    """
    return switch_of(model).precision


def allowed_precisions(model: nn.Module) -> tuple[Precision, ...]:
    """Return the precisions that the model was converted for, in the order given to `convert()`.

    Raises:
        UsageError: the model is not switchable.
    """
    return switch_of(model).allowed


@contextmanager
def at_precision(model: nn.Module, precision: PrecisionLike) -> Generator[None]:
    """Switch the model for the duration of a block and restore the precision after it.

    Raises:
        UsageError: the precision is not allowed, or the model is not switchable.
    """
    switch = switch_of(model)
    before = switch.precision
    switch.set(precision)
    try:
        yield
    finally:
        switch.precision = before


@contextmanager
def frozen_weights(model: nn.Module) -> Generator[None]:
    """Quantize each weight once per precision inside a block, in which no parameter receives a gradient.

    This is for patch crafting and evaluation, where many forwards share one set of weights. The outputs are the same
    numbers as outside, and gradients flow to the input. The precision may be switched inside. Weights must not be
    changed inside.
    """
    switch = switch_of(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    before = switch.frozen
    switch.frozen = {} if before is None else before
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        switch.frozen = before
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Put the model in eval mode, without gradients, for the duration of a block; restore the mode of each module."""
    was_training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in was_training:
            module.training = training


@contextmanager
def observing(model: nn.Module, observer: Observer) -> Generator[None]:
    """Run the model in float and eval mode, without gradients, for the duration of a block.

    Args:
        model: a switchable model; its precision and modes are restored after the block.
        observer: called at every quantizer of weights and activations, with the quantizer and the float tensor that
            it would quantize.
    """
    switch = switch_of(model)
    before = switch.precision
    switch.precision, switch.observer = Precision(FLOAT_BITS, FLOAT_BITS), observer
    try:
        with evaluating(model):
            yield
    finally:
        switch.precision, switch.observer = before, None


def precisions_or_all(model: nn.Module, precisions: Sequence[PrecisionLike] | None) -> tuple[Precision, ...]:
    """Return the given precisions, each checked to be allowed, or all allowed ones for None.

    Raises:
        UsageError: a precision is not allowed.
    """
    switch = switch_of(model)
    if precisions is None:
        return switch.allowed
    with at_precision(model, switch.precision):
        for precision in (parsed := parse_precisions(precisions)):
            switch.set(precision)
    return parsed
