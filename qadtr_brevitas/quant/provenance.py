"""Provenance of tensors, followed through every function that a network calls.

Four facts about a tensor are recorded, which hold whatever the weights are: which activation module's values it holds
(or the image's), whether it depends on the image at all, whether it can be negative, and whether it holds the values of
a function that has levels of its own (softmax, GELU).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from qadtr_brevitas.quant.frozen import version_of

# The origin of the image; the other origins are names of activation modules.
IMAGE = "image"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The results of these hold only values of their first argument, and zeros.
_PRESERVING = _names(
    "__get__ __getitem__ _pad adaptive_max_pool1d adaptive_max_pool2d alpha_dropout broadcast_to chunk clone "
    "contiguous detach dropout dropout2d expand expand_as flatten flip float gather index_select max_pool1d "
    "max_pool2d moveaxis movedim narrow pad permute pixel_shuffle pixel_unshuffle repeat repeat_interleave reshape "
    "reshape_as roll rot90 select split squeeze swapaxes tensor_split to transpose type type_as unbind unflatten "
    "unfold unsqueeze view view_as"
)
_JOINS = _names("cat concat concatenate")
# These add values up. A layer that reads their result quantizes it anyway.
_POOLS = _names("adaptive_avg_pool1d adaptive_avg_pool2d avg_pool1d avg_pool2d mean")
_NONNEGATIVE = _names("abs exp hardsigmoid hardsigmoid_ relu relu_ relu6 sigmoid sigmoid_ softmax softplus square")
# The results of these are never negative if no tensor and no number among their arguments is.
_ARITHMETIC = _names(
    "__radd__ __rmul__ add add_ clamp clamp_ div div_ hardtanh maximum minimum mul mul_ multiply true_divide"
)
_SIGN_KEEPING = _PRESERVING | _POOLS | _names("amax cat concat interpolate max sqrt stack sum")
# The results of these have distributions of their own, for which there are quantizers.
SOFTMAX, GELU = "softmax", "gelu"
# The results of these take only their shape from a tensor.
_SHAPED_AS = _names("empty_like full_like new_empty new_full new_ones new_tensor new_zeros ones_like zeros_like")


# The filling value and the mode of these may make other values than those of the first argument, and negative ones.
_PADS = _names("_pad pad")
_RESIZES = _names("interpolate")
_SIGN_KEEPING_MODES = _names("nearest nearest-exact linear bilinear trilinear area")


class TensorFacts:
    """The facts known about the arguments of one call, before the call.

    Args:
        known: the provenance of all tensors so far.
        function: the function.
        args: the positional arguments.
        kwargs: the named ones.
    """

    def __init__(
        self, known: Provenance, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        name = getattr(function, "__name__", "")
        given = [*args, *kwargs.values()]
        found = [] if name in _SHAPED_AS else list(tensors_in(given))
        self._versions = [(x, version_of(x)) for x in tensors_in(given)]
        self.name = name
        self.is_preserving = name in _PRESERVING
        self.first_origin = known.origin(found[0]) if found else None
        self.first_function = known.function(found[0]) if found else None
        self.origins = [origin for x in found if (origin := known.origin(x)) is not None]
        self.joined = self.origins if name in _JOINS and known.can_join(found) else []
        self.is_fixed = all(known.is_fixed(x) for x in found)
        self.parameters = frozenset[str]().union(*(known.parameters(x) for x in found))
        numbers = [x for x in given if isinstance(x, int | float)] if name in _ARITHMETIC else []
        self.is_nonnegative = bool(found) and min(numbers, default=0) >= 0 and all(map(known.is_nonnegative, found))
        if name in _PADS:
            filling = float(_argument("value", 3, args, kwargs) or 0)
            self.is_preserving, self.is_nonnegative = filling == 0, self.is_nonnegative and filling >= 0
        elif name in _RESIZES:
            mode = _argument("mode", 3, args, kwargs) or "nearest"
            self.is_nonnegative = self.is_nonnegative and mode in _SIGN_KEEPING_MODES

    @property
    def result_is_nonnegative(self) -> bool:
        """Whether the result of the call cannot be negative."""
        keeping = self.name in _SIGN_KEEPING or self.name in _ARITHMETIC
        return self.name in _NONNEGATIVE or (keeping and self.is_nonnegative)

    @property
    def result_function(self) -> str | None:
        """SOFTMAX or GELU if the result holds only values of that function, and zeros; else None."""
        return self.name if self.name in (SOFTMAX, GELU) else self.first_function if self.is_preserving else None

    @property
    def result_needs_quantizing(self) -> bool:
        """Whether the result has other levels than a quantized argument."""
        return not self.is_preserving and self.name not in _POOLS

    @property
    def changed(self) -> list[Tensor]:
        """The arguments that the call changed in place."""
        return [x for x, version in self._versions if version_of(x) != version]


def _argument(name: str, position: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return args[position] if position < len(args) else kwargs.get(name)


class Provenance:
    """The facts known about every tensor of one forward pass.

    Args:
        net: the network; its parameters are weights, its buffers constants.
        image: the input.
        nonnegative_image: whether the input is never negative, as pixels before normalization.
        joins: whether a concatenation of the outputs of activation modules of one kind holds the values of the first of
            them, as they are to have one quantizer.
    """

    def __init__(self, net: nn.Module, image: Tensor, *, nonnegative_image: bool, joins: bool = False) -> None:
        self._joins = joins
        # The classes of the activation modules that are origins.
        self._kinds: dict[str, type[nn.Module]] = {}
        self._origins: dict[int, str] = {id(image): IMAGE}
        # The parameters that enter a tensor that does not depend on the image.
        self._fixed: dict[int, frozenset[str]] = {id(buffer): frozenset() for buffer in net.buffers()}
        self._fixed |= {id(parameter): frozenset([name]) for name, parameter in net.named_parameters()}
        self._functions: dict[int, str] = {}
        self._nonnegative: set[int] = {id(image)} if nonnegative_image else set()
        # By the memory that they share. Tensors are kept alive so that no id is used twice.
        self._views: dict[int, list[Tensor]] = {}
        for x in (image, *net.buffers(), *net.parameters()):
            self._remember(x)

    def origin(self, x: Tensor) -> str | None:
        """Return the name of the activation module whose values x holds, IMAGE, or None."""
        return self._origins.get(id(x))

    def key(self, x: Tensor) -> int | None:
        """Return what tells x from all other tensors of the forward; None if x is not followed."""
        return id(x) if any(x is other for other in self._views.get(_memory(x), [])) else None

    def is_fixed(self, x: Tensor) -> bool:
        """Return whether x is the same for every image."""
        return id(x) in self._fixed

    def parameters(self, x: Tensor) -> frozenset[str]:
        """Return the names of the parameters that x is computed from; none if it depends on the image."""
        return self._fixed.get(id(x), frozenset())

    def is_nonnegative(self, x: Tensor) -> bool:
        """Return whether x cannot be negative."""
        return id(x) in self._nonnegative

    def function(self, x: Tensor) -> str | None:
        """Return SOFTMAX or GELU if x holds only values of that function, and zeros; else None."""
        return self._functions.get(id(x))

    def can_join(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether tensors hold the values of activation modules that may have one quantizer."""
        kinds = {self._kinds.get(self.origin(x) or "") for x in tensors}
        return self._joins and len(kinds) == 1 and None not in kinds

    def mark(self, x: Tensor, origin: str, kind: type[nn.Module]) -> None:
        """Record that x is the output of an activation module of a class, which is never negative."""
        self._forget(x)
        self._origins[id(x)] = origin
        self._kinds[origin] = kind
        self._nonnegative.add(id(x))
        self._remember(x)

    def follow(self, facts: TensorFacts, result: Any) -> None:
        """Record the facts about the result of a call, from those about its arguments before the call."""
        for x in facts.changed:
            self._forget_views(x, facts)
        for y in tensors_in([result]):
            self._forget(y)
            if facts.first_origin is not None and (facts.is_preserving or facts.joined):
                self._origins[id(y)] = facts.first_origin
            if facts.result_function is not None:
                self._functions[id(y)] = facts.result_function
            if facts.is_fixed:
                self._fixed[id(y)] = facts.parameters
            if facts.result_is_nonnegative:
                self._nonnegative.add(id(y))
            self._remember(y)

    def _forget_views(self, changed: Tensor, facts: TensorFacts) -> None:
        """Forget what a change in place makes false: of the tensor, and of all that share its memory."""
        if facts.is_preserving:
            return
        for x in self._views.get(_memory(changed), []):
            self._origins.pop(id(x), None)
            self._functions.pop(id(x), None)
            if id(x) in self._fixed:
                self._fixed[id(x)] |= facts.parameters
            if not facts.is_fixed:
                self._fixed.pop(id(x), None)
            if not facts.result_is_nonnegative:
                self._nonnegative.discard(id(x))

    def _remember(self, x: Tensor) -> None:
        self._views.setdefault(_memory(x), []).append(x)

    def _forget(self, x: Tensor) -> None:
        self._origins.pop(id(x), None)
        self._functions.pop(id(x), None)
        self._fixed.pop(id(x), None)
        self._nonnegative.discard(id(x))


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield every tensor among values, also those in lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)  # pyright: ignore[reportUnknownArgumentType]
