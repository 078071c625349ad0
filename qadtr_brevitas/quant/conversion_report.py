"""What convert() did to every layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One layer of the network.

    Args:
        name: dotted module name.
        type: class name in the float network.
        quantized: whether it computes on quantized values below 32 bit.
        note: how it is quantized, or why it stays float.
        parameters: number of parameters, 0 if none.
    """

    name: str
    type: str
    quantized: bool
    note: str
    parameters: int


@dataclass(frozen=True)
class ConversionReport:
    """Every layer that runs, in order of execution; nothing is passed over."""

    layers: tuple[LayerReport, ...]

    @property
    def quantized_share(self) -> float:
        """Share of the parameters of convolutions and linear layers, of all parameters, that are quantized."""
        total = sum(layer.parameters for layer in self.layers)
        return sum(layer.parameters for layer in self.layers if layer.quantized) / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"quantized_share": self.quantized_share, "layers": [asdict(layer) for layer in self.layers]}
