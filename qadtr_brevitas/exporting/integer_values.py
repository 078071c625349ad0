"""Values of a network as sums of integer tensors times factors per channel: what is computed in floats is put off.

BatchNorms, biases and averages only change the factors and the offset. A value becomes integers again where a quantizer
rounds it, in one operation (`combine`), or where an operation needs one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil, log2
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = Any

# Products of a tensor and its multiplier stay below 2^62, so that their sum fits into 64 bits.
_ROOM = 60
_LARGEST_SHIFT = 48
# Steps of a value that is rounded where the network rounds nothing.
_FINE = 2.0**24


@dataclass(frozen=True)
class Term:
    """An integer tensor times a factor per channel, (C,) or (1,)."""

    tensor: str
    scale: Array


@dataclass(frozen=True)
class Value:
    """The sum of some terms and an offset per channel, (C,) or (1,); the shape is that for one image."""

    terms: tuple[Term, ...]
    offset: Array
    shape: tuple[int, ...]

    @property
    def is_single(self) -> bool:
        """Whether it is one tensor, in the order of its integers."""
        return len(self.terms) == 1 and bool((self.terms[0].scale > 0).all())

    @property
    def is_levels(self) -> bool:
        """Whether it is one tensor times one step."""
        return self.is_single and not self.offset.any() and bool((self.terms[0].scale == self.terms[0].scale[0]).all())

    def times(self, factor: Array) -> Value:
        """Return the value times a factor per channel."""
        terms = tuple(replace(term, scale=term.scale * factor) for term in self.terms)
        return replace(self, terms=terms, offset=self.offset * factor)

    def plus(self, offset: Array) -> Value:
        """Return the value plus an offset per channel."""
        return replace(self, offset=self.offset + offset)


@dataclass
class Program:
    """The operations and what they read, as they are written to the file.

    Attributes:
        operations: in order, as JSON.
        tensors: arrays of the safetensors file.
        weights: bits and shape of packed weights.
        levels: step, zero point and bits of the tensors of levels.
        bounds: largest magnitude of each integer tensor.
    """

    operations: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    tensors: dict[str, Array] = field(default_factory=dict[str, Array])
    weights: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    levels: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    bounds: dict[str, int] = field(default_factory=dict[str, int])

    def add(
        self, operation: str, layer: str, inputs: list[str], shape: tuple[int, ...], bound: int, **facts: Any
    ) -> str:
        """Append an operation, and return the name of its output."""
        output = f"t{len(self.operations) + 1}"
        entry = {"operation": operation, "layer": layer, "inputs": inputs, "output": output, "shape": list(shape)}
        self.operations.append({**entry, "bits": bound.bit_length() + 1, **facts})
        self.bounds[output] = bound
        return output

    def each(self, operation: str, layer: str, value: Value, shape: tuple[int, ...], grows: int = 1, **facts: Any):
        """Apply an operation to the tensor of each term; return the value, with its factors and offset as they are."""
        terms = tuple(
            replace(
                term,
                tensor=self.add(operation, layer, [term.tensor], shape, self.bounds[term.tensor] * grows, **facts),
            )
            for term in value.terms
        )
        return replace(value, terms=terms, shape=shape)

    def combine(self, layer: str, value: Value, step: float, limits: tuple[int, int] | None) -> Value:
        """Round a value to multiples of a step, between limits where there are some."""
        factors = [term.scale / step for term in value.terms]
        offset = value.offset / step
        reach = float(self._reach(value, step))
        shift = min(_LARGEST_SHIFT, _ROOM - max(0, ceil(log2(max(reach, 1)))))
        number = len(self.operations) + 1
        names = [f"t{number}.multiplier.{index}" for index in range(len(factors))]
        for name, factor in zip(names, factors, strict=True):
            self.tensors[name] = np.rint(factor * 2.0**shift).astype(np.int64)
        self.tensors[f"t{number}.offset"] = np.rint(offset * 2.0**shift).astype(np.int64)
        bound = ceil(reach) + 1 if limits is None else max(map(abs, limits))
        output = self.add(
            "combine",
            layer,
            [term.tensor for term in value.terms],
            value.shape,
            bound,
            multipliers=names,
            offset=f"t{number}.offset",
            shift=shift,
            low=None if limits is None else limits[0],
            high=None if limits is None else limits[1],
        )
        return Value((Term(output, np.array([step])),), np.zeros(1), value.shape)

    def single(self, layer: str, value: Value) -> Value:
        """Return a value that is one tensor times one step, rounded finely where it is none."""
        if value.is_levels:
            return value
        return self.combine(layer, value, max(self._reach(value, 1.0), 1e-30) / _FINE, None)

    def _reach(self, value: Value, step: float) -> float:
        parts = [abs(term.scale) * self.bounds[term.tensor] for term in value.terms]
        return float(np.max(sum(parts) + abs(value.offset)) / step)
