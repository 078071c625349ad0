"""What FPGA compilers refuse, or compute wrongly without a word, looked for in the graph before they see it."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np

from qadtr_brevitas.core.errors import ExportError, first_names
from qadtr_brevitas.exporting.compiler import Compiler
from qadtr_brevitas.exporting.graph import attribute, bits_of, constant, layer_of, nodes_of, scale_of
from qadtr_brevitas.exporting.rewrite import factor_behind, is_ceiled

_MAX_ACT_BITS = 8
_PRODUCTS = ("Conv", "Gemm", "MatMul")
_POOLS = ("GlobalAveragePool", "ReduceMean", "AveragePool")
# Values pass these without leaving their levels.
_PASSING = ("MaxPool", "Flatten", "Reshape", "Identity", "Squeeze", "Unsqueeze")
_AFFINE = ("BatchNormalization", "Mul", "Div", "Add", "Sub")
_KNOWN = {"Quant", "Relu", *_PRODUCTS, *_POOLS, *_PASSING, *_AFFINE}
_ADVICE = {
    "Slice": "it cuts tensors apart, as an adaptive pool to a size that is no factor of its input does",
    "Concat": "it joins tensors",
    "Pad": "it cuts pixels off, adds others than zeros, or has other readers than convolutions",
    "Clip": "it is followed by no quantizer of its own",
    "Resize": "it makes images larger, as an adaptive pool does to more pixels than there are: use larger images",
    "Transpose": "it moves channels or tokens",
}
# What conversion for the compiler puts right.
_UNQUANTIZED_SUM = "adds activations that are not quantized"
_UNEQUAL_SUM = "adds activations on different levels"
_STEPS = "steps that are no powers of two"
_CURED = (_UNQUANTIZED_SUM, _UNEQUAL_SUM, _STEPS)


def check_network(model: Any, compiler: Compiler) -> None:
    """Refuse a graph that a compiler would refuse, or compute wrongly.

    Args:
        model: a qonnx ModelWrapper with all shapes and the names that PyTorch gave.
        compiler: the compiler.

    Raises:
        ExportError: what is in the way, each kind once, with the layers that it concerns and the remedy.
    """
    found: dict[str, list[str]] = {}
    for layer, what in _all(model, compiler):
        layers = found.setdefault(what, [])
        if layer not in layers:
            layers.append(layer)
    if not found:
        return
    message = ". ".join(f"{first_names(layers)}: {what}" for what, layers in found.items())
    if any(what in _CURED for what in found):
        message += (
            f". Sums and steps come right with `qadtr-brevitas convert MODEL --target {compiler.name}`, or training "
            f"with quant.target={compiler.name}"
        )
    raise ExportError(f"{compiler.name} cannot take this network. {message}")


def _all(model: Any, compiler: Compiler) -> Iterator[tuple[str, str]]:
    for node in model.graph.node:
        if constant(model, node.output[0]) is None:
            for what in (*_node(model, node, compiler), *compiler.limits(model, node)):
                yield layer_of(node), what
    if compiler.power_of_two:
        yield from _scales(model)


def _node(model: Any, node: Any, compiler: Compiler) -> Iterator[str]:
    kind = node.op_type
    if kind not in _KNOWN:
        yield f"{kind} has no place between integers" + (f" ({_ADVICE[kind]})" if kind in _ADVICE else "")
    elif kind in _PRODUCTS:
        yield from _product(model, node)
    elif kind in _POOLS:
        yield from _pool(model, node, compiler)
    elif kind == "MaxPool":
        if is_ceiled(model, node):
            yield "a max pool over fewer pixels at the border (ceil_mode): use images of another size"
        if max(attribute(node, "dilations", [1])) > 1:
            yield "a max pool with dilation: leave dilation out"
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
    elif len(model.get_tensor_shape(node.input[0])) != 2:
        yield "a linear layer for each of several tokens"


def _geometry(model: Any, node: Any) -> Iterator[str]:
    _, channels, *size = model.get_tensor_shape(node.input[0])
    outputs = model.get_tensor_shape(node.output[0])[1]
    if (groups := attribute(node, "group", 1)) not in (1, channels):
        yield "a convolution in groups that is not depthwise: give it one group, or as many as channels"
    elif groups > 1 and outputs != channels:
        yield f"a depthwise convolution with {outputs // channels} outputs for each channel: give it one"
    if size == [1, 1] and max(attribute(node, "kernel_shape")) > 1:
        yield "a kernel larger than 1x1 on an image of 1x1: use larger images"


def _pool(model: Any, node: Any, compiler: Compiler) -> Iterator[str]:
    # `rewrite` makes a convolution of it, and leaves what is none.
    if node.op_type == "AveragePool":
        uneven = any(attribute(node, "pads", [0])) and not attribute(node, "count_include_pad", 0)
        if uneven or is_ceiled(model, node):
            yield "an average over fewer pixels at the border"
    elif node.op_type == "ReduceMean" and len(model.get_tensor_shape(node.input[0])) != 4:
        yield "a mean that is no pooling"
    if not compiler.averages_floats and _quant_behind(model, node.input[0]) is None:
        yield "pools activations that are not quantized: in front of the pool use nn.ReLU, a module and no function"


def _elementwise(model: Any, node: Any) -> Iterator[str]:
    if any(constant(model, name) is not None for name in node.input):
        return
    if node.op_type != "Add":
        yield f"{node.op_type} of two activations, as in a gate, has no place between integers"
        return
    quants = [_quant_behind(model, name) for name in node.input]
    if any(quant is None for quant in quants):
        yield _UNQUANTIZED_SUM
    elif len({_facts(model, quant) for quant in quants}) > 1:
        yield _UNEQUAL_SUM


def _facts(model: Any, quant: Any) -> tuple[float, ...]:
    return (float(scale_of(model, quant)), attribute(quant, "signed"), bits_of(model, quant))


def _quant_behind(model: Any, name: str) -> Any:
    """Return the Quant node whose values a tensor holds; a pool's result is a multiple of them."""
    producer = model.find_producer(name)
    while producer is not None and (producer.op_type in (*_PASSING, *_POOLS) or _is_factor_of_pool(model, producer)):
        producer = model.find_producer(producer.input[0])
    return producer if producer is not None and producer.op_type == "Quant" else None


def _is_factor_of_pool(model: Any, node: Any) -> bool:
    """Return whether a node is the factor that `rewrite` merges into the average in front of it."""
    pool = model.find_producer(node.input[0])
    if pool is None or pool.op_type not in _POOLS:
        return False
    _, product = factor_behind(model, pool)
    return product is not None and product.output[0] == node.output[0]


def _scales(model: Any) -> Iterator[tuple[str, str]]:
    for quant in nodes_of(model, "Quant"):
        if (np.frexp(scale_of(model, quant))[0] != 0.5).any():
            yield layer_of(quant), _STEPS
    for pool in nodes_of(model, *_POOLS):
        pixels = prod(attribute(pool, "kernel_shape") or model.get_tensor_shape(pool.input[0])[2:])
        factor, _ = factor_behind(model, pool)
        # A factor of 4 / 3 is a float.
        divisor = round(pixels / factor, 4)
        if np.frexp(divisor)[0] == 0.5:
            continue
        if factor == 1:
            yield layer_of(pool), f"an average over {pixels} pixels, no power of two: use images of another size"
        else:
            yield layer_of(pool), f"an average that divides by {divisor:g}, no power of two: choose another divisor"
