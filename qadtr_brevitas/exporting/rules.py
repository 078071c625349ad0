"""What FPGA compilers refuse, or compute wrongly without a word, looked for in the graph before they see it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from qadtr_brevitas.exporting.graph import attribute, bits_of, constant, layer_of, nodes_of, scale_of

_MAX_ACT_BITS = 8
_PRODUCTS = ("Conv", "Gemm", "MatMul")
_POOLS = ("GlobalAveragePool", "ReduceMean", "AveragePool")
# Values pass these without leaving their levels.
_PASSING = ("MaxPool", "Flatten", "Reshape", "Identity", "Squeeze", "Unsqueeze")
_AFFINE = ("BatchNormalization", "Mul", "Div", "Add", "Sub")
_KNOWN = {"Quant", "Relu", *_PRODUCTS, *_POOLS, *_PASSING, *_AFFINE}
_ADVICE = {
    "Slice": "a shortcut without weights that FINN has no hardware for",
    "Concat": "joins tensors",
    "Clip": "is followed by no quantizer of its own",
}
_SHOWN = 4


def problems(model: Any, *, power_of_two: bool) -> list[str]:
    """Return what is in the way, each kind once, with the layers that it concerns.

    Args:
        model: a qonnx ModelWrapper with all shapes and the names that PyTorch gave.
        power_of_two: refuse steps that are no powers of two (hls4ml computes in fixed point).
    """
    found: dict[str, list[str]] = {}
    for layer, what in _all(model, power_of_two=power_of_two):
        layers = found.setdefault(what, [])
        if layer not in layers:
            layers.append(layer)
    return [f"{_names(layers)}: {what}" for what, layers in found.items()]


def _names(layers: list[str]) -> str:
    more = f" and {len(layers) - _SHOWN} more" if len(layers) > _SHOWN else ""
    return ", ".join(layers[:_SHOWN]) + more


def _all(model: Any, *, power_of_two: bool) -> Iterator[tuple[str, str]]:
    for node in model.graph.node:
        if constant(model, node.output[0]) is None:
            for what in _node(model, node):
                yield layer_of(node), what
    if power_of_two:
        yield from _scales(model)


def _node(model: Any, node: Any) -> Iterator[str]:
    kind = node.op_type
    if kind not in _KNOWN:
        yield f"{kind} has no place between integers" + (f" ({_ADVICE[kind]})" if kind in _ADVICE else "")
    elif kind in _PRODUCTS:
        yield from _product(model, node)
    elif kind in _POOLS:
        yield from _pool(model, node)
    elif kind == "Quant":
        if (bits := bits_of(model, node)) > _MAX_ACT_BITS:
            yield f"activations of {bits} bits, more than the {_MAX_ACT_BITS} there are thresholds for"
    elif kind in ("Add", "Sub", "Mul", "Div"):
        yield from _elementwise(model, node)


def _product(model: Any, node: Any) -> Iterator[str]:
    if any(constant(model, name) is None for name in node.input[1:2]):
        yield "multiplies activations by activations"
        return
    if _quant_behind(model, node.input[0]) is None:
        yield "computes on activations that are not quantized"
    weights = model.find_producer(node.input[1])
    if weights is None or weights.op_type != "Quant":
        yield "its weights are not quantized"
    if node.op_type == "Conv":
        yield from _geometry(model, node)


def _geometry(model: Any, node: Any) -> Iterator[str]:
    _, channels, *size = model.get_tensor_shape(node.input[0])
    if attribute(node, "group", 1) not in (1, channels):
        yield "a convolution in groups that is not depthwise"
    if size == [1, 1] and max(attribute(node, "kernel_shape")) > 1:
        yield "a kernel larger than 1x1 on an image of 1x1: use larger images"


def _pool(model: Any, node: Any) -> Iterator[str]:
    # `rewrite` makes a convolution of it, and leaves what is none.
    if node.op_type == "AveragePool":
        uneven = any(attribute(node, "pads", [0])) and not attribute(node, "count_include_pad", 0)
        if uneven or attribute(node, "ceil_mode", 0):
            yield "an average over fewer pixels at the border"
    elif node.op_type == "ReduceMean" and len(model.get_tensor_shape(node.input[0])) != 4:
        yield "a mean that is no pooling"
    if _quant_behind(model, node.input[0]) is None:
        yield "pools activations that are not quantized"


def _elementwise(model: Any, node: Any) -> Iterator[str]:
    if any(constant(model, name) is not None for name in node.input):
        return
    if node.op_type != "Add":
        yield f"{node.op_type} of two activations, as in a gate, has no place between integers"
        return
    quants = [_quant_behind(model, name) for name in node.input]
    if any(quant is None for quant in quants):
        yield "adds activations that are not quantized"
    elif len({_facts(model, quant) for quant in quants}) > 1:
        yield "adds activations on different levels"


def _facts(model: Any, quant: Any) -> tuple[float, ...]:
    return (float(scale_of(model, quant)), attribute(quant, "signed"), bits_of(model, quant))


def _quant_behind(model: Any, name: str) -> Any:
    """Return the Quant node whose values a tensor holds; a pool's result is a multiple of them."""
    producer = model.find_producer(name)
    while producer is not None and producer.op_type in (*_PASSING, *_POOLS):
        producer = model.find_producer(producer.input[0])
    return producer if producer is not None and producer.op_type == "Quant" else None


def _scales(model: Any) -> Iterator[tuple[str, str]]:
    for quant in nodes_of(model, "Quant"):
        if (np.frexp(scale_of(model, quant))[0] != 0.5).any():
            yield layer_of(quant), "steps that are no powers of two"
    for pool in nodes_of(model, *_POOLS):
        height, width = attribute(pool, "kernel_shape") or model.get_tensor_shape(pool.input[0])[2:]
        if np.frexp(height * width)[0] != 0.5:
            yield (
                layer_of(pool),
                f"an average over {height * width} pixels, no power of two: use images of another size",
            )
