"""Provenance of tensors, followed through every function that a network calls.

Three facts about a tensor are recorded, which hold whatever the weights are: which activation module's values it holds
(or the image's), whether it depends on the image at all, and whether it can be negative.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

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
# These add values up. A layer that reads their result quantizes it anyway.
_POOLS = _names("adaptive_avg_pool1d adaptive_avg_pool2d avg_pool1d avg_pool2d mean")
_NONNEGATIVE = _names("abs exp hardsigmoid hardsigmoid_ relu relu_ relu6 sigmoid sigmoid_ softmax softplus square")
# The results of these are never negative if no tensor and no number among their arguments is.
_ARITHMETIC = _names(
    "__radd__ __rmul__ add add_ clamp clamp_ div div_ hardtanh maximum minimum mul mul_ multiply true_divide"
)
_SIGN_KEEPING = _PRESERVING | _POOLS | _names("amax cat concat interpolate max sqrt stack sum")
# The results of these take only their shape from a tensor.
_SHAPED_AS = _names("empty_like full_like new_empty new_full new_ones new_tensor new_zeros ones_like zeros_like")


class TensorFacts:
    """The facts known about the arguments of one call.

    Args:
        known: the provenance of all tensors so far.
        name: name of the function.
        args: every argument, positional or named.
    """

    def __init__(self, known: Provenance, name: str, args: Iterable[Any]) -> None:
        given = list(args)
        found = [] if name in _SHAPED_AS else list(tensors_in(given))
        self.name = name
        self.first = found[0] if found else None
        self.first_origin = known.origin(found[0]) if found else None
        self.origins = [origin for x in found if (origin := known.origin(x)) is not None]
        self.is_fixed = all(known.is_fixed(x) for x in found)
        self.parameters = frozenset[str]().union(*(known.parameters(x) for x in found))
        numbers = [x for x in given if isinstance(x, int | float)] if name in _ARITHMETIC else []
        self.is_nonnegative = bool(found) and min(numbers, default=0) >= 0 and all(map(known.is_nonnegative, found))

    @property
    def result_is_nonnegative(self) -> bool:
        """Whether the result of the call cannot be negative."""
        keeping = self.name in _SIGN_KEEPING or self.name in _ARITHMETIC
        return self.name in _NONNEGATIVE or (keeping and self.is_nonnegative)

    @property
    def result_needs_quantizing(self) -> bool:
        """Whether the result has other levels than a quantized argument."""
        return self.name not in _PRESERVING and self.name not in _POOLS


class Provenance:
    """The facts known about every tensor of one forward pass.

    Args:
        net: the network; its parameters are weights, its buffers constants.
        image: the input.
        nonnegative_image: whether the input is never negative, as pixels before normalization.
    """

    def __init__(self, net: nn.Module, image: Tensor, *, nonnegative_image: bool) -> None:
        self._origins: dict[int, str] = {id(image): IMAGE}
        # The parameters that enter a tensor that does not depend on the image.
        self._fixed: dict[int, frozenset[str]] = {id(buffer): frozenset() for buffer in net.buffers()}
        self._fixed |= {id(parameter): frozenset([name]) for name, parameter in net.named_parameters()}
        self._nonnegative: set[int] = {id(image)} if nonnegative_image else set()
        # Tensors are kept alive so that no id is used twice.
        self._alive: list[Tensor] = [image]

    def origin(self, x: Tensor) -> str | None:
        """Return the name of the activation module whose values x holds, IMAGE, or None."""
        return self._origins.get(id(x))

    def is_fixed(self, x: Tensor) -> bool:
        """Return whether x is the same for every image."""
        return id(x) in self._fixed

    def parameters(self, x: Tensor) -> frozenset[str]:
        """Return the names of the parameters that x is computed from; none if it depends on the image."""
        return self._fixed.get(id(x), frozenset())

    def is_nonnegative(self, x: Tensor) -> bool:
        """Return whether x cannot be negative."""
        return id(x) in self._nonnegative

    def mark(self, x: Tensor, origin: str) -> None:
        """Record that x is the output of an activation module, which is never negative."""
        self._forget(x)
        self._origins[id(x)] = origin
        self._nonnegative.add(id(x))
        self._alive.append(x)

    def follow(self, facts: TensorFacts, result: Any) -> None:
        """Record the facts about the result of a call, from those about its arguments before the call."""
        if facts.name == "__setitem__" and facts.first is not None and not facts.is_fixed:
            self._forget(facts.first)
        for y in tensors_in([result]):
            self._forget(y)
            if facts.name in _PRESERVING and facts.first_origin is not None:
                self._origins[id(y)] = facts.first_origin
            if facts.is_fixed:
                self._fixed[id(y)] = facts.parameters
            if facts.result_is_nonnegative:
                self._nonnegative.add(id(y))
            self._alive.append(y)

    def _forget(self, x: Tensor) -> None:
        self._origins.pop(id(x), None)
        self._fixed.pop(id(x), None)
        self._nonnegative.discard(id(x))


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield every tensor among values, also those in lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)  # pyright: ignore[reportUnknownArgumentType]
