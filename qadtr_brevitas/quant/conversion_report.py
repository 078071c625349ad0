"""What convert() did to every layer."""

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
        parameters: number of parameters of its own, 0 if none.
        quantized_parameters: how many of them belong to a layer whose weight is quantized.
        macs: multiply-accumulates for one image, of its own.
        quantized_macs: how many of them are on quantized operands.
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
    """Every module that runs, in order of execution, and every parameter; nothing is passed over.

    Args:
        layers: one entry each.
        sizes: bytes of all weights and statistics by precision, each weight at its own bit-width, packed.
    """

    layers: tuple[LayerReport, ...]
    sizes: Mapping[str, int]

    @property
    def parameters(self) -> int:
        """Number of all parameters."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        return sum(layer.macs for layer in self.layers)

    @property
    def quantized_macs(self) -> int:
        """Those of them that are on quantized operands."""
        return sum(layer.quantized_macs for layer in self.layers)

    @property
    def quantized_share(self) -> float:
        """Share of all parameters that belong to layers whose weight is quantized."""
        total = self.parameters
        return sum(layer.quantized_parameters for layer in self.layers) / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "quantized_share": self.quantized_share,
            "parameters": self.parameters,
            "macs": self.macs,
            "quantized_macs": self.quantized_macs,
            "sizes": dict(self.sizes),
            "layers": [asdict(layer) for layer in self.layers],
        }
