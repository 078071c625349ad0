"""The settings of a conversion, applied to the products and activations of a network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from torch import nn

from qadtr_brevitas.core.precision import FLOAT_BITS, MIN_BITS
from qadtr_brevitas.quant.probe import Call, Operand, Probe, Product
from qadtr_brevitas.quant.products import PRODUCTS_OF_HEADS, ROWS_ARE_CHANNELS
from qadtr_brevitas.quant.provenance import IMAGE
from qadtr_brevitas.quant.proxies import act_injector, weight_injector
from qadtr_brevitas.quant.quantizer import Quantizer
from qadtr_brevitas.quant.switch import Switch
from qadtr_brevitas.quant.switchable_quant import WIDE_BITS, SwitchableWeightQuant
from qadtr_brevitas.quant.targets import Target

FirstLast = Literal["8bit", "same", "float"]
Residual = Literal["8bit", "same"]
Norm = Literal["statistics", "switchable"]
Activations = Literal["static", "dynamic"]
AttentionScales = Literal["tensor", "head"]


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """The settings of `convert()`, and what the probe found.

    Args:
        switch: the model's switch.
        first_last, residual, norm, narrow_range, per_channel, activations, attention_scales: as in `convert()`.
        quantizes_once: whether the target takes it (`Target`), and the model is not of an earlier version.
        target: the compiler to convert for; None for any.
        weight_quantizer: the quantizer of weights.
        act_quantizer: the quantizer of activations.
        quantizers_after: those of the values of functions that have quantizers of their own, by function.
        wide_head_input: as in `convert()`.
        probe: the record of a forward of the network.
    """

    switch: Switch
    first_last: FirstLast
    residual: Residual
    norm: Norm
    narrow_range: bool
    per_channel: bool
    activations: Activations
    attention_scales: AttentionScales
    target: Target | None
    weight_quantizer: Quantizer
    act_quantizer: Quantizer
    quantizers_after: Mapping[str, Quantizer]
    wide_head_input: bool
    quantizes_once: bool
    probe: Probe

    def min_bits(self, product: Product) -> int:
        """Return the least bit-width of the operands of a product at precisions below 32."""
        setting = self.residual if product.is_sum else self.first_last if product.is_first_or_last else "same"
        return WIDE_BITS if setting == "8bit" else MIN_BITS

    def stays_float(self, product: Product) -> bool:
        """Return whether a product stays float."""
        if product.is_sum:
            return any(operand.fixed for operand in product.operands)
        return product.is_constant or (product.is_first_or_last and self.first_last == "float")

    def weight_shape(self, shape: Sequence[int], *, linear: bool) -> tuple[int, ...]:
        """Return the shape of the thresholds of a layer's weight of the shape (out, in / groups, ...).

        A layer whose input channels are not a multiple of the group size has one threshold per output channel.
        """
        granularity = self.weight_quantizer.granularity or ("channel" if self.per_channel else "tensor")
        if linear and self.target is not None and not self.target.linear_per_channel:
            granularity = "tensor"
        ones = (1,) * (len(shape) - 1)
        if granularity == "tensor":
            return (1, *ones)
        size = self.weight_quantizer.group_size
        if granularity == "group" and shape[1] % size == 0 and shape[1] > size:
            return (shape[0], shape[1] // size, 1, *ones[1:])
        return (shape[0], *ones)

    def is_wide_stream(self, name: str | None) -> bool:
        """Return whether an activation module keeps 8 bit as a residual stream."""
        calls = self._calls(name)
        return self.residual == "8bit" and any(call.feeds_sum for call in calls)

    def is_wide_end(self, name: str | None) -> bool:
        """Return whether an activation module keeps 8 bit because the first or last layer reads it."""
        wanted = self.wide_head_input and self.first_last == "8bit"
        return wanted and any(call.feeds_end for call in self._calls(name))

    def _calls(self, name: str | None) -> list[Call]:
        """Return the calls of an activation module, and of those that have its quantizer."""
        calls = self.probe.calls
        return [calls[other] for other in self.probe.joined_with(name) if other in calls]

    def is_quantized(self, operand: Operand, product: Product) -> bool:
        """Return whether an operand holds values that an activation module has quantized to the wanted bit-width.

        Layers that read a wide activation quantize it further. Sums want no fewer bits than what they read has.
        """
        if product.is_sum:
            return operand.origin not in (None, IMAGE)
        if operand.origin in (None, IMAGE) or self.is_wide_stream(operand.origin):
            return False
        return not self.is_wide_end(operand.origin) or self.min_bits(product) == WIDE_BITS

    def thresholds(self, product: Product, operand: Operand, *, is_layer: bool) -> int:
        """Return the number of thresholds of a weight: of a layer, or of a product that a module computes itself."""
        if is_layer:
            return prod(self.weight_shape(operand.shape, linear=product.name == "linear"))
        return operand.shape[0] if self.is_per_channel(product) else 1

    def is_per_channel(self, product: Product) -> bool:
        """Return whether each output channel of a weight that is computed in the forward has its own threshold."""
        granularity = self.weight_quantizer.granularity or ("channel" if self.per_channel else "tensor")
        return granularity != "tensor" and product.name in ROWS_ARE_CHANNELS

    def operand(self, operand: Operand, product: Product) -> Any:
        """Return the injector of the quantizer of an operand of a product that is no weight."""
        is_image = operand.origin == IMAGE
        return self.activation(
            signed=not operand.nonnegative,
            min_bits=self.min_bits(product),
            reads_pixels=is_image,
            function=operand.function,
            shape=self.head_shape(product),
        )

    def head_shape(self, product: Product) -> tuple[int, ...]:
        """Return the shape of the thresholds of a product's activations: (1, heads, 1, 1), or () for one of all.

        Heads are the second dimension of (images, heads, tokens, features), as torch's attention has them.
        """
        shapes = [operand.shape for operand in product.operands if not operand.fixed]
        has_heads = product.name in PRODUCTS_OF_HEADS and len(shapes) > 1 and all(len(shape) == 4 for shape in shapes)
        heads = {shape[1] for shape in shapes} if has_heads else set()
        if self.attention_scales == "tensor" or len(heads) != 1 or heads == {1}:
            return ()
        return (1, *heads, 1, 1)

    def activation(
        self,
        *,
        signed: bool,
        min_bits: int,
        max_threshold: float | None = None,
        reads_pixels: bool = False,
        function: str | None = None,
        shape: tuple[int, ...] = (),
    ) -> Any:
        """Return the injector of a quantizer of activations: of the values of a function, if it is given."""
        bits = tuple(p.act for p in self.switch.allowed if p.act != FLOAT_BITS and not p.is_mixed)
        return act_injector(
            self.switch,
            bits=bits,
            min_bits=min_bits,
            signed=signed,
            max_threshold=max_threshold,
            scheme=self.quantizers_after.get(function or "", self.act_quantizer),
            dynamic=self.activations == "dynamic",
            reads_pixels=reads_pixels,
            shape=shape,
        )

    def weight(self, shape: tuple[int, ...], *, min_bits: int) -> Any:
        """Return the injector of a quantizer of a layer's weight, whose thresholds have this shape."""
        return weight_injector(
            self.switch,
            bits=self._weight_bits(),
            min_bits=min_bits,
            narrow_range=self.narrow_range,
            shape=shape,
            scheme=self.weight_quantizer,
        )

    def computed_weight(self, shape: tuple[int, ...], *, min_bits: int) -> Any:
        """Return the injector, for a QuantIdentity, of a quantizer of a weight that is computed in the forward."""
        return act_injector(
            self.switch,
            tensor_quant=SwitchableWeightQuant,
            bits=self._weight_bits(),
            min_bits=min_bits,
            signed=True,
            narrow_range=self.narrow_range,
            shape=shape,
            scheme=self.weight_quantizer,
        )

    def _weight_bits(self) -> tuple[int, ...]:
        return tuple(p.weight for p in self.switch.allowed if p.weight != FLOAT_BITS and not p.is_mixed)


def mark_first_and_last(net: nn.Module, probe: Probe) -> None:
    """Mark the products of the first and last layers: those that read the image, the first, the last, the classifier.

    Args:
        net: the float network.
        probe: the record of its forward; the products are marked in place.
    """
    counted = [product for product in probe.products if not product.is_constant]
    heads = set(_classifier_names(net))
    for product in counted:
        reads_image = any(operand.origin == IMAGE for operand in product.operands)
        product.is_first_or_last = reads_image or product.owner in heads
    if counted:
        counted[0].is_first_or_last = counted[-1].is_first_or_last = True
    for product in counted:
        for operand in product.operands:
            if product.is_first_or_last and operand.origin in probe.calls:
                probe.calls[operand.origin].feeds_end = True


def _classifier_names(net: nn.Module) -> Iterator[str]:
    """Return the names of the linear layers that timm calls the classifier; a distilled transformer has two."""
    get_classifier = getattr(net, "get_classifier", None)
    found = get_classifier() if callable(get_classifier) else None
    modules: Iterable[Any] = found if isinstance(found, tuple | list) else [found]
    heads = {id(part) for module in modules if isinstance(module, nn.Module) for part in module.modules()}
    return (name for name, module in net.named_modules() if id(module) in heads and isinstance(module, nn.Linear))
