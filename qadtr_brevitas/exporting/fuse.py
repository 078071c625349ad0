"""Standard ONNX in the form that onnxruntime turns into integer kernels: BatchNorm merged, biases of 32 bit.

Between DequantizeLinear, Conv and QuantizeLinear it wants nothing but a ReLU, and biases on the levels of the
accumulator. Merging a BatchNorm's factor into the steps of the weights is exact; rounding a bias to the accumulator
brings a few values to the next level, which the layers behind pass on the louder the fewer their bits are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qadtr_brevitas.exporting.graph import attribute, library, nodes_of

_INT8, _INT32 = np.iinfo(np.int8), np.iinfo(np.int32)


@dataclass
class _Layer:
    """A convolution's weights, (out, in, ...) of int8, with their steps (out,), float bias (out,) and input's step."""

    weights: Any
    steps: Any
    bias: Any
    input_step: float


def fuse(model: Any) -> int:
    """Merge BatchNorms and round biases wherever that is exact, in place.

    Args:
        model: a qonnx ModelWrapper of what Brevitas's QCDQ export wrote.

    Returns:
        How many convolutions have become what onnxruntime fuses.
    """
    fused = sum(_fuse(model, conv) for conv in nodes_of(model, "Conv"))
    _remove_unread(model)
    return fused


def _remove_unread(model: Any) -> None:
    """Remove the nodes that made the former weights, last first."""
    wanted = {output.name for output in model.graph.output}
    for node in reversed(list(model.graph.node)):
        if wanted.isdisjoint(node.output):
            model.graph.node.remove(node)
        else:
            wanted.update(node.input)


def _fuse(model: Any, conv: Any) -> bool:
    layer = _read(model, conv)
    if layer is None:
        return False
    readers = model.find_consumers(conv.output[0])
    norm = readers[0] if len(readers) == 1 and readers[0].op_type == "BatchNormalization" else None
    if norm is not None and not _merge(model, layer, norm):
        return False
    _use_bytes(layer)
    accumulator = layer.input_step * layer.steps
    bias = np.round(layer.bias / accumulator)
    if (np.abs(bias) > _INT32.max).any():
        return False
    dequantized = [
        _dequantized(model, layer.weights, layer.steps),
        _dequantized(model, bias.astype(np.int32), accumulator),
    ]
    del conv.input[1:]
    conv.input.extend(dequantized)
    if norm is not None:
        conv.output[0] = norm.output[0]
        model.graph.node.remove(norm)
    return True


def _read(model: Any, conv: Any) -> _Layer | None:
    """None where something is not quantized, or not from 0 on."""
    given, weights = _levels_behind(model, conv.input[0]), model.find_producer(conv.input[1])
    if any(node is None or node.op_type != "DequantizeLinear" for node in (given, weights)):
        return None
    stored = model.find_producer(weights.input[0])
    ints = _constant(model, weights.input[0] if stored is None or stored.op_type != "Clip" else stored.input[0])
    steps, zero = (_constant(model, name) for name in weights.input[1:3])
    if ints is None or ints.dtype != np.int8 or np.any(zero) or np.any(_constant(model, given.input[2])):
        return None
    out = ints.shape[0]
    bias = _constant(model, conv.input[2]) if len(conv.input) > 2 else np.zeros(out)
    if bias is None:
        return None
    steps = np.broadcast_to(steps.astype(np.float64), (out,))
    return _Layer(ints.copy(), steps, bias.astype(np.float64), float(_constant(model, given.input[1])))


def _levels_behind(model: Any, name: str) -> Any:
    """Return the node that gives a tensor its levels: a max pool only passes them on."""
    producer = model.find_producer(name)
    while producer is not None and producer.op_type == "MaxPool":
        producer = model.find_producer(producer.input[0])
    return producer


def _merge(model: Any, layer: _Layer, norm: Any) -> bool:
    """Take a BatchNorm into a layer; False where a level would have no counterpart of the other sign."""
    gamma, beta, mean, var = (_constant(model, name).astype(np.float64) for name in norm.input[1:5])
    factor = gamma / np.sqrt(var + attribute(norm, "epsilon", 1e-5))
    if (layer.weights[factor < 0] == _INT8.min).any():
        return False
    layer.weights[factor < 0] *= -1
    layer.weights[factor == 0] = 0
    layer.steps = layer.steps * np.where(factor == 0, 1, np.abs(factor))
    layer.bias = beta + (layer.bias - mean) * factor
    return True


def _use_bytes(layer: _Layer) -> None:
    """Multiplies weights by the largest power of two that fits into int8, channel by channel, and divides their steps.

    The products are the same and the accumulator, which biases are rounded to, is finer: of 4-bit weights by 16.
    """
    flat = layer.weights.reshape(len(layer.weights), -1).astype(np.float64)
    room = np.minimum(_INT8.max / flat.max(1).clip(min=1), _INT8.min / flat.min(1).clip(max=-1))
    factor = 2.0 ** np.floor(np.log2(room))
    layer.weights = (layer.weights * factor.reshape(-1, *[1] * (layer.weights.ndim - 1))).astype(np.int8)
    layer.steps = layer.steps / factor


def _constant(model: Any, name: str) -> Any:
    """Return the value of a tensor that is fixed, also where it goes by another name; None for others."""
    producer = model.find_producer(name)
    while producer is not None and producer.op_type == "Identity":
        name = producer.input[0]
        producer = model.find_producer(name)
    if producer is not None and producer.op_type == "Constant":
        return library("onnx").numpy_helper.to_array(attribute(producer, "value"))
    return model.get_initializer(name)


def _dequantized(model: Any, ints: Any, steps: Any) -> str:
    """Return the name of the product of integers (out, ...) and steps (out,)."""
    onnx = library("onnx")
    names = [f"fused_{len(model.graph.initializer)}_{part}" for part in ("levels", "steps", "zero", "values")]
    arrays = (ints, steps.astype(np.float32), np.zeros(len(steps), ints.dtype))
    for name, array in zip(names, arrays, strict=False):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
    model.graph.node.insert(0, onnx.helper.make_node("DequantizeLinear", names[:3], names[3:], name=names[3], axis=0))
    return names[3]
