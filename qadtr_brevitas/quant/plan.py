"""What a conversion has been asked for, and which parts of a network that concerns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from qadtr_brevitas.core.precision import FLOAT_BITS, MIN_BITS
from qadtr_brevitas.quant.probe import Operand, Probe, Product
from qadtr_brevitas.quant.provenance import IMAGE
from qadtr_brevitas.quant.quantizers import EDGE_BITS, SwitchableWeightQuant, act_injector, weight_injector
from qadtr_brevitas.quant.switch import Switch

Edge = Literal["8bit", "same", "float"]
Residual = Literal["8bit", "same"]
Norm = Literal["statistics", "switchable"]
Activations = Literal["static", "dynamic"]
Target = Literal["finn", "hls4ml"]


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """The settings of `convert()`, and what the probe found.

    Args:
        switch: the model's switch.
        edge, residual, norm, narrow_range, per_channel, activations, target: as in `convert()`.
        probe: what the network does.
    """

    switch: Switch
    edge: Edge
    residual: Residual
    norm: Norm
    narrow_range: bool
    per_channel: bool
    activations: Activations
    target: Target | None
    probe: Probe

    def min_bits(self, product: Product) -> int:
        """Least bit-width of the operands of a product, below 32."""
        setting = self.residual if product.is_sum else self.edge if product.edge else "same"
        return EDGE_BITS if setting == "8bit" else MIN_BITS

    def stays_float(self, product: Product) -> bool:
        """Whether a product is left as it is."""
        if product.is_sum:
            return any(operand.fixed for operand in product.operands)
        return product.is_constant or (product.edge and self.edge == "float")

    def is_per_channel(self, layer: nn.Module) -> bool:
        """Whether each output channel of a layer has a threshold of its own."""
        # hls4ml refuses scales per channel in linear layers.
        return self.per_channel and not (self.target == "hls4ml" and isinstance(layer, nn.Linear))

    def is_wide_stream(self, name: str | None) -> bool:
        """Whether what an activation module of this name gives keeps 8 bit, for a later layer to quantize further."""
        return self.residual == "8bit" and name in self.probe.calls and self.probe.calls[name].feeds_sum

    def is_quantized(self, operand: Operand) -> bool:
        """Whether an operand holds values that an activation module has quantized as finely as is needed."""
        return operand.origin not in (None, IMAGE) and not self.is_wide_stream(operand.origin)

    def activation(self, *, signed: bool, min_bits: int, max_threshold: float | None = None) -> Any:
        """Injector of a quantizer of activations."""
        bits = tuple(p.act for p in self.switch.allowed if p.act != FLOAT_BITS)
        return act_injector(
            self.switch,
            bits=bits,
            min_bits=min_bits,
            signed=signed,
            max_threshold=max_threshold,
            power_of_two=self._power_of_two,
            dynamic=self.activations == "dynamic",
        )

    def weight(self, shape: tuple[int, ...], *, min_bits: int) -> Any:
        """Injector of a quantizer of a layer's weight, whose thresholds have this shape."""
        return weight_injector(
            self.switch,
            bits=self._weight_bits(),
            min_bits=min_bits,
            narrow_range=self.narrow_range,
            shape=shape,
            power_of_two=self._power_of_two,
        )

    def computed_weight(self, shape: tuple[int, ...], *, min_bits: int) -> Any:
        """Injector, for a QuantIdentity, of a quantizer of a weight that is computed in the forward."""
        return act_injector(
            self.switch,
            tensor_quant=SwitchableWeightQuant,
            bits=self._weight_bits(),
            min_bits=min_bits,
            signed=True,
            narrow_range=self.narrow_range,
            shape=shape,
            power_of_two=self._power_of_two,
        )

    @property
    def _power_of_two(self) -> bool:
        # hls4ml computes in fixed point, in which only steps of this kind are exact.
        return self.target == "hls4ml"

    def _weight_bits(self) -> tuple[int, ...]:
        return tuple(p.weight for p in self.switch.allowed if p.weight != FLOAT_BITS)


def mark_edges(net: nn.Module, probe: Probe) -> None:
    """Marks the products of the first and last layers: what reads the image, the first and last of all, the classifier.

    Args:
        net: the float network.
        probe: what it does; its products are marked in place.
    """
    counted = [product for product in probe.products if not product.is_constant]
    heads = set(_classifier_names(net))
    for product in counted:
        reads_image = any(operand.origin == IMAGE for operand in product.operands)
        product.edge = reads_image or product.owner in heads
    if counted:
        counted[0].edge = counted[-1].edge = True


def _classifier_names(net: nn.Module) -> Iterator[str]:
    """Names of the linear layers that timm calls the classifier; a distilled transformer has two."""
    get_classifier = getattr(net, "get_classifier", None)
    found = get_classifier() if callable(get_classifier) else None
    modules: Iterable[Any] = found if isinstance(found, tuple | list) else [found]
    heads = {id(part) for module in modules if isinstance(module, nn.Module) for part in module.modules()}
    return (name for name, module in net.named_modules() if id(module) in heads and isinstance(module, nn.Linear))
