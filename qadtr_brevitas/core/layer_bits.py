"""Bit-widths per layer, by patterns of names: what a mixed precision consists of.

    {"*": 4, "layer4.*": {"weight": 8, "activation": 8}, "fc": "w8a4"}

A pattern is a name of a module in the float network, in which `*` stands for anything. Where several match, the last
one that says something counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, PlainSerializer

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.precision import Precision

_KEYS = ("weight", "activation")
_RULE = "give 8, w4a8, or {weight: 4, activation: 8} with one of the two or both"


@dataclass(frozen=True)
class LayerBits:
    """Bit-widths of the weights and of the activations of some layers; None for what is said elsewhere."""

    weight: int | None = None
    act: int | None = None

    @classmethod
    def parse(cls, value: Any) -> LayerBits:
        """Read 8, "w4a8", or a mapping with `weight`, `activation` or both.

        Raises:
            UsageError: anything else, or a bit-width that is not possible.
        """
        if isinstance(value, LayerBits):
            return value
        if not isinstance(value, Mapping):
            both = Precision.parse(value)
            if both.is_mixed:
                raise UsageError(f"{value} is no bit-width of a layer: {_RULE}")
            return cls(both.weight, both.act)
        given: dict[Any, Any] = dict(value)  # pyright: ignore[reportUnknownArgumentType]
        if not given or not set(given) <= set(_KEYS):
            raise UsageError(f"{given} is no bit-width of a layer: {_RULE}")
        bits = [None if given.get(key) is None else Precision.parse(given[key]).weight for key in _KEYS]
        return cls(*bits)

    def to_json(self) -> dict[str, int]:
        """Return the mapping that `parse` reads."""
        return {key: bits for key, bits in zip(_KEYS, (self.weight, self.act), strict=True) if bits is not None}


def _read(value: Any) -> LayerBits:
    try:
        return LayerBits.parse(value)
    except UsageError as error:
        raise ValueError(str(error)) from error


LayerBitsField: TypeAlias = Annotated[LayerBits, BeforeValidator(_read), PlainSerializer(LayerBits.to_json)]
"""Type of a field that holds the bit-widths of a layer."""


@dataclass(frozen=True)
class MixedPrecision:
    """A mixed precision: its name, and bit-widths by pattern, later ones before earlier ones.

    Raises:
        UsageError: the name is not possible.
    """

    name: str
    patterns: Mapping[str, LayerBits]

    def __post_init__(self) -> None:
        Precision.mixed(self.name)

    @classmethod
    def make(cls, name: str, patterns: Mapping[str, Any]) -> MixedPrecision:
        """Read the bit-widths of each pattern.

        Raises:
            UsageError: the name or a bit-width is not possible.
        """
        return cls(name, {pattern: LayerBits.parse(bits) for pattern, bits in patterns.items()})

    @property
    def precision(self) -> Precision:
        """The precision that a model is switched to."""
        return Precision.mixed(self.name)

    def weight(self, layer: str) -> int | None:
        """Return the bit-width of the weights of a layer; None if no pattern says."""
        return next((bits.weight for bits in self._matching(layer) if bits.weight is not None), None)

    def act(self, layer: str) -> int | None:
        """Return the bit-width of the activations that a module quantizes; None if no pattern says."""
        return next((bits.act for bits in self._matching(layer) if bits.act is not None), None)

    def _matching(self, layer: str) -> list[LayerBits]:
        return [bits for pattern, bits in reversed([*self.patterns.items()]) if fnmatchcase(layer, pattern)]


def parse_layers(text: str) -> dict[str, dict[str, Any]]:
    """Read NAME:PATTERN=BITS,PATTERN=BITS, or a JSON file of {NAME: {PATTERN: BITS}}, as `analyze sensitivity` writes.

    Raises:
        UsageError: it is neither.
    """
    path = Path(text)
    if path.suffix == ".json":
        return _read_file(path)
    name, separator, rest = text.partition(":")
    parts = [part.partition("=") for part in rest.split(",")]
    if not separator or not name or any(not pattern.strip() or not bits for pattern, _, bits in parts):
        raise UsageError(
            f"--layers {text} is not NAME:PATTERN=BITS,PATTERN=BITS, for instance 'edge:*=4,layer4.*=w8a8', nor the "
            "name of a .json file"
        )
    return {name.strip(): {pattern.strip(): bits.strip() for pattern, _, bits in parts}}


def _read_file(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--layers {path} cannot be read ({error}): give a JSON file {{NAME: {{PATTERN: BITS}}}}"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(patterns, dict) for patterns in found.values()):
        raise UsageError(f"--layers {path} is not {{NAME: {{PATTERN: BITS}}}}")
    return found
