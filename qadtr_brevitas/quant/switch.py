"""The current precision of a switchable model: one small object that every quantizer and norm layer reads."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import FLOAT_BITS, Precision, PrecisionLike, parse_precisions

# Is shown a quantizer (SwitchableQuant) and the tensor it would have to quantize.
Observer = Callable[[Any, Tensor], None]


class Folding(Protocol):
    """The norms folded into convolutions while patches are made (`quant.folding.folded_norms`)."""

    @property
    def norms(self) -> frozenset[nn.Module]:
        """The norms that are folded, and have nothing left to do."""
        ...

    @property
    def in_place(self) -> bool:
        """Whether ReLUs write over what they read."""
        ...

    def weights(self, conv: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weights (out, in / groups, height, width) and bias (out,) of a convolution with its norm folded in."""
        ...

    def arithmetic(self, images: Tensor) -> AbstractContextManager[Any]:
        """What a forward over images runs in, at the precision in force."""
        ...


class Switch:
    """The precision in force and the weights quantized for it, shared by all layers of one model.

    A plain object and no module: setting an attribute switches the whole network, whatever its size, and
    `copy.deepcopy` of a model gives the copy a switch of its own.

    While `observer` is set, quantizers show it what they would have to quantize and pass it on as it is. `images` is
    the number of images in the batch under way.

    Args:
        precisions: the allowed precisions; the first one is in force at the start.
    """

    def __init__(self, precisions: Sequence[Precision]) -> None:
        self.allowed = tuple(precisions)
        self.precision = self.allowed[0]
        self.frozen: dict[tuple[int, int], tuple[Tensor, ...]] | None = None
        self.observer: Observer | None = None
        self.folding: Folding | None = None
        self.images = 1

    def set(self, precision: PrecisionLike) -> None:
        """Puts a precision in force.

        Raises:
            UsageError: the precision is not among the allowed ones.
        """
        wanted = Precision.parse(precision)
        if wanted not in self.allowed:
            names = ", ".join(str(p) for p in self.allowed)
            raise UsageError(f"this model has no precision {wanted}: it was converted for {names}")
        self.precision = wanted


def switch_of(model: nn.Module) -> Switch:
    """The switch of a switchable model, also through wrappers such as DistributedDataParallel.

    Raises:
        UsageError: the model was not converted.
    """
    for module in model.modules():
        if isinstance(switch := getattr(module, "switch", None), Switch):
            return switch
    raise UsageError(f"{type(model).__name__} is not a switchable model: call convert() on it first")


def set_precision(model: nn.Module, precision: PrecisionLike) -> None:
    """Switches the model in place: every quantizer and norm layer at once, in microseconds.

    Raises:
        UsageError: the precision is not allowed (the allowed ones are named), or the model is not switchable.
    """
    switch_of(model).set(precision)


def get_precision(model: nn.Module) -> Precision:
    """The precision in force."""
    return switch_of(model).precision


def allowed_precisions(model: nn.Module) -> tuple[Precision, ...]:
    """The precisions the model was converted for, in the order given to convert()."""
    return switch_of(model).allowed


@contextmanager
def at_precision(model: nn.Module, precision: PrecisionLike) -> Generator[None]:
    """Switches the model for the duration of a block and restores the precision after it."""
    switch = switch_of(model)
    before = switch.precision
    switch.set(precision)
    try:
        yield
    finally:
        switch.precision = before


@contextmanager
def frozen_weights(model: nn.Module) -> Generator[None]:
    """Holds the weights still: each is quantized once a precision, and no parameter receives a gradient.

    For patch crafting and evaluation, where many forwards share one set of weights. The outputs are the same
    numbers as outside; gradients still flow to the input. The precision may be switched inside. Weights must not
    be changed inside.
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
    """Puts the model in eval mode, without gradients, for the duration of a block; restores the mode of each module."""
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
    """Runs the model in float and eval mode for the duration of a block, without gradients.

    Args:
        model: a switchable model; its precision and modes are restored after the block.
        observer: is called at every quantizer of weights and activations, with the quantizer and the float tensor
            it would have to quantize.
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
    """The given precisions, each checked to be allowed, or all allowed ones for None.

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
