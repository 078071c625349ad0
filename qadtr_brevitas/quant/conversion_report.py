"""The report of `convert()`: what it did to every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One module of the network.

    Args:
        name: dotted module or parameter name.
        type: class name in the float network.
        quantized: whether it computes on quantized values below 32 bit.
        note: how it is quantized, or why it stays float.
        parameters: number of parameters, without those of submodules.
        quantized_parameters: number of them that belong to a layer whose weight is quantized.
        macs: multiply-accumulates for one image, without those of submodules.
        quantized_macs: number of them on quantized operands.
    """

    name: str
    type: str
    quantized: bool
    note: str
    parameters: int
    quantized_parameters: int = 0
    macs: int = 0
    quantized_macs: int = 0


@dataclass(frozen=True)
class ConversionReport:
    """Every module that runs, in order of execution, and every parameter.

    Args:
        layers: one entry per module or parameter.
        sizes: bytes of all weights and statistics by precision, each weight packed at its own bit-width.
    """

    layers: tuple[LayerReport, ...]
    sizes: Mapping[str, int]

    @property
    def parameters(self) -> int:
        """The number of all parameters."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        return sum(layer.macs for layer in self.layers)

    @property
    def quantized_macs(self) -> int:
        """Multiply-accumulates on quantized operands, for one image."""
        return sum(layer.quantized_macs for layer in self.layers)

    @property
    def quantized_share(self) -> float:
        """Share of all parameters that belong to layers whose weight is quantized."""
        total = self.parameters
        return sum(layer.quantized_parameters for layer in self.layers) / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "quantized_share": self.quantized_share,
            "parameters": self.parameters,
            "macs": self.macs,
            "quantized_macs": self.quantized_macs,
            "sizes": dict(self.sizes),
            "layers": [asdict(layer) for layer in self.layers],
        }
