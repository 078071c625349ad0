"""The current precision of a switchable model, in one object that every quantizer and norm layer reads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import FLOAT_BITS, Precision, PrecisionLike, parse_precisions
from qadtr_brevitas.quant.frozen import FrozenWeights
from qadtr_brevitas.quant.tensor_levels import Prepared

# Called with a quantizer (SwitchableQuant) and the float tensor that it would quantize; returns what takes its place,
# or None for the tensor as it is in float.
Observer = Callable[[Any, Tensor], Tensor | None]


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


class Passes(Protocol):
    """Another form of a network, that some passes run through (`quant.compiled.compiled_passes`)."""

    def serves(self, images: Tensor) -> bool:
        """Return whether it can take the place of the network as it is set now."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits of images, (N, classes)."""
        ...


T = TypeVar("T")
_UNSET = object()


class SwitchState:
    """What a switch is set to in one thread. A layer reads it once a forward, its attributes are then plain ones.

    Args:
        precision: the current precision.

    Attributes:
        frozen: weights quantized within `frozen_weights`; None outside.
        observer: called by each quantizer instead of quantizing, with the tensor; it returns what passes, None for the
            tensor as it is.
        folding: the norms folded into convolutions; None if none are.
        passes: the form that passes run through where it serves them; None for the network itself.
        prepared: tensors to compute with instead of the parameters; None for the parameters.
        images: number of images in the batch that is running.
        is_repeating: whether so many passes without gradients are made that they too are worth another form.
    """

    def __init__(self, precision: Precision) -> None:
        self.precision = precision
        self.frozen: FrozenWeights | None = None
        self.observer: Observer | None = None
        self.folding: Folding | None = None
        self.passes: Passes | None = None
        self.prepared: Prepared | None = None
        self.images = 1
        self.is_repeating = False


class _ThreadState(SwitchState):
    """The state in a thread other than the main one, whose values it has where the thread set none itself."""

    def __init__(self, main: SwitchState) -> None:
        # Not super().__init__, which would set every value.
        self._main = main

    def __getattr__(self, name: str) -> Any:
        return getattr(self._main, name)


class _States(threading.local):
    """The state in each thread.

    Args:
        main: that of the main thread.
    """

    def __init__(self, main: SwitchState) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        self.now = main if is_main else _ThreadState(main)


class _PerThread(Generic[T]):
    """An attribute of a switch that is one of its state in the current thread."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, switch: Switch, owner: type) -> T:
        return getattr(switch.states.now, self._name)

    def __set__(self, switch: Switch, value: T) -> None:
        setattr(switch.states.now, self._name, value)


class Switch:
    """The current precision and the weights quantized for it, shared by all layers of one model.

    This is a plain object, not a module: setting one attribute switches the whole network, whatever its size, and
    `copy.deepcopy` of a model copies the switch with it. Each thread has a current state of its own, so that threads
    can run one model at different precisions at once; a thread that switches nothing follows the main thread.

    Args:
        precisions: the allowed precisions; the first one is the current one at the start.

    Attributes:
        precision: and all others: those of `SwitchState`, in the current thread.
        states: `states.now` is the state in the current thread, for code that reads several of its attributes.
    """

    precision = _PerThread[Precision]()
    frozen = _PerThread["FrozenWeights | None"]()
    observer = _PerThread["Observer | None"]()
    folding = _PerThread["Folding | None"]()
    passes = _PerThread["Passes | None"]()
    prepared = _PerThread["Prepared | None"]()
    images = _PerThread[int]()
    is_repeating = _PerThread[bool]()

    def __init__(self, precisions: Sequence[Precision]) -> None:
        self.allowed = tuple(precisions)
        self._main = SwitchState(self.allowed[0])
        self.states = _States(self._main)
        # Parameters that take no gradient as long as a thread is within `frozen_weights`.
        self._held: list[nn.Parameter] = []
        self._holders = 0
        self._lock = threading.Lock()

    @contextmanager
    def having(self, **values: Any) -> Generator[None]:
        """Set attributes for the duration of a block, in the current thread."""
        own = vars(self.states.now)
        before = {name: own.get(name, _UNSET) for name in values}
        own.update(values)
        try:
            yield
        finally:
            for name, value in before.items():
                own[name] = value
                if value is _UNSET:
                    del own[name]

    def checked(self, precision: PrecisionLike) -> Precision:
        """Return a precision that is allowed.

        Raises:
            UsageError: the precision is not among the allowed ones.
        """
        wanted = Precision.parse(precision)
        if wanted not in self.allowed:
            names = ", ".join(str(p) for p in self.allowed)
            raise UsageError(f"this model has no precision {wanted}: it was converted for {names}")
        return wanted

    def set(self, precision: PrecisionLike) -> None:
        """Switch to a precision.

        Raises:
            UsageError: the precision is not among the allowed ones.
        """
        self.precision = self.checked(precision)

    @contextmanager
    def holding(self, parameters: Iterable[nn.Parameter]) -> Generator[None]:
        """Let parameters take no gradient for the duration of a block, which several threads may be in."""
        with self._lock:
            if self._holders == 0:
                self._held = [parameter for parameter in parameters if parameter.requires_grad]
            self._holders += 1
            for parameter in self._held:
                parameter.requires_grad_(False)
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if self._holders == 0:
                    self.let_go()

    def let_go(self) -> None:
        """Let the held parameters take gradients again, as a copy that is made within the block must."""
        for parameter in self._held:
            parameter.requires_grad_(True)
        self._held = []

    def __getstate__(self) -> dict[str, Any]:
        # A copy starts outside of any block: the weights that are quantized in one belong to the original.
        return {"allowed": self.allowed, "precision": self.precision, "held": self._held}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["allowed"])
        self._main.precision = state["precision"]
        self._held = state["held"]


def switch_of(model: nn.Module) -> Switch:
    """Return the switch of a switchable model, also through wrappers such as DistributedDataParallel.

    Raises:
        UsageError: the model was not converted, or holds several switchable models.
    """
    first, *others = switches_of(model)
    if others:
        raise UsageError(
            f"{type(model).__name__} holds {1 + len(others)} switchable models: call this for each of them by itself"
        )
    return first


def switches_of(model: nn.Module) -> list[Switch]:
    """Return the switch of each switchable model within a model, at least one.

    Raises:
        UsageError: the model was not converted.
    """
    found = list(dict.fromkeys(_switches_within(model)))
    if not found:
        raise UsageError(f"{type(model).__name__} is not a switchable model: call convert() on it first")
    return found


def _switches_within(module: nn.Module) -> Iterator[Switch]:
    if isinstance(switch := getattr(module, "switch", None), Switch):
        yield switch
        return
    for child in module.children():
        yield from _switches_within(child)


def set_precision(model: nn.Module, precision: PrecisionLike) -> None:
    """Switch the model in place: every quantizer and norm layer at once, in microseconds.

    A module that holds several switchable models, as an ensemble does, switches them all. Only the current thread
    switches, and those that never switched the model themselves if it is the main thread.

    Raises:
        UsageError: the precision is not allowed (the allowed ones are named), or the model is not switchable.
    """
    for switch, wanted in [(switch, switch.checked(precision)) for switch in switches_of(model)]:
        switch.precision = wanted


def get_precision(model: nn.Module) -> Precision:
    """Return the current precision.

    Raises:
        UsageError: the model is not switchable, or holds several models at different precisions.
    """
    found = {switch.precision for switch in switches_of(model)}
    if len(found) > 1:
        names = ", ".join(map(str, sorted(found, reverse=True)))
        raise UsageError(f"{type(model).__name__} holds switchable models at the precisions {names}: ask each of them")
    return found.pop()


def allowed_precisions(model: nn.Module) -> tuple[Precision, ...]:
    """Return the precisions that the model was converted for, in the order given to `convert()`.

    Raises:
        UsageError: the model is not switchable, or holds several models that have no precision in common.
    """
    first, *others = switches_of(model)
    common = tuple(p for p in first.allowed if all(p in other.allowed for other in others))
    if not common:
        raise UsageError(f"{type(model).__name__} holds switchable models that have no precision in common")
    return common


@contextmanager
def at_precision(model: nn.Module, precision: PrecisionLike) -> Generator[None]:
    """Switch the model for the duration of a block and restore the precision after it.

    Raises:
        UsageError: the precision is not allowed, or the model is not switchable.
    """
    wanted = [(switch, switch.checked(precision)) for switch in switches_of(model)]
    with ExitStack() as stack:
        for switch, checked in wanted:
            stack.enter_context(switch.having(precision=checked))
        yield


@contextmanager
def frozen_weights(model: nn.Module) -> Generator[None]:
    """Quantize each weight once per precision inside a block, in which no parameter receives a gradient.

    This is for patch crafting and evaluation, where many forwards share one set of weights. The outputs are the same
    numbers as outside, and gradients flow to the input. The precision may be switched inside, and what is changed
    in place is quantized anew.
    """
    with ExitStack() as stack:
        for switch in switches_of(model):
            stack.enter_context(switch.holding(model.parameters()))
            stack.enter_context(switch.having(frozen=switch.frozen or FrozenWeights()))
        yield


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
            it would quantize; it returns what takes the tensor's place, or None.
    """
    float_precision = Precision(FLOAT_BITS, FLOAT_BITS)
    with switch_of(model).having(precision=float_precision, observer=observer), evaluating(model):
        yield


def precisions_or_all(model: nn.Module, precisions: Sequence[PrecisionLike] | None) -> tuple[Precision, ...]:
    """Return the given precisions, each checked to be allowed, or all allowed ones for None.

    Raises:
        UsageError: a precision is not allowed.
    """
    if precisions is None:
        return allowed_precisions(model)
    parsed = parse_precisions(precisions)
    for switch in switches_of(model):
        for precision in parsed:
            switch.checked(precision)
    return parsed
