"""Standard ONNX in the form that onnxruntime turns into integer kernels.

Between DequantizeLinear, a layer and QuantizeLinear it wants nothing but a ReLU, unsigned bytes, and biases on the
levels of the accumulator. Merging a BatchNorm's factor into the steps of the weights is exact; rounding a bias to the
accumulator brings a few values to the next level, which the layers behind pass on the louder the fewer their bits are.

On x86 processors without VNNI sums of two products of an unsigned with a signed byte saturate at 16 bit. Weights of up
to 7 bit are written so that none exceeds 64: 2 * 255 * 64 does not saturate. Those of 8 bit need a session option
there, which `deployed.run.session_options` sets; unsigned bytes need none, and take twice the time where VNNI is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qadtr_brevitas.exporting.constants import remove_unread
from qadtr_brevitas.exporting.graph import attribute, library, nodes_of
from qadtr_brevitas.exporting.rewrite import reconnect

_INT8 = np.iinfo(np.int8)
_ZERO = 128
# Of weights whose products cannot saturate.
_LARGEST_WEIGHT = 64
# Half of what an accumulator holds; the other half is room for the products.
_LARGEST_BIAS = 2.0**30
LAYERS = ("Conv", "Gemm", "MatMul")
# These give an output the levels of their input.
_PASSING = ("MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze")


@dataclass
class Layer:
    """A layer's weights, (out, in, ...) of int8, with their steps (out,), float bias (out,) and input's step."""

    weights: Any
    steps: Any
    bias: Any
    input_step: float


def fuse(model: Any) -> None:
    """Bring a graph into the form for integer kernels, in place.

    Args:
        model: a qonnx ModelWrapper of what Brevitas's QCDQ export wrote, with constants folded.
    """
    for node in list(model.graph.node):
        _quantize_once(model, node.output[0])
    for node in nodes_of(model, "MaxPool", "Concat"):
        _pass_levels(model, node)
    for node in nodes_of(model, "Conv"):
        _keep_levels(model, node)
    for node in nodes_of(model, "Conv", "Gemm"):
        _fuse(model, node)
    for node in nodes_of(model, "Mul"):
        _scale_steps(model, node)
    for node in nodes_of(model, "MatMul"):
        _fuse_tokens(model, node)
    _use_unsigned_bytes(model)
    remove_unread(model.graph)
    # What is said of types there is not true any more.
    del model.graph.value_info[:]


def obstacle(model: Any, node: Any) -> str:
    """Return what keeps a layer of a graph that `fuse` made from an integer kernel; nothing if nothing is known."""
    if any(_levels_behind(model, name) is None for name in node.input[:2]):
        return "reads values that are not quantized"
    if node.op_type != "Conv":
        return ""
    readers = model.find_consumers(node.output[0])
    while len(readers) == 1 and readers[0].op_type in ("Relu", "Clip"):
        readers = model.find_consumers(readers[0].output[0])
    kinds = sorted({reader.op_type for reader in readers} - {"QuantizeLinear"})
    if kinds == ["Add"]:
        return "its result is added in floats: convert with --target ort, which quantizes sums"
    return f"its result is not quantized before {', '.join(kinds) or 'the output'}" if kinds or not readers else ""


def _quantize_once(model: Any, name: str) -> None:
    """Let all quantizers of a tensor but one read the values of that one, as integer kernels give one result.

    It is the one with the widest range, so nothing is clipped more. The others round what is rounded already, which
    moves a value by half a step of the first one at most.
    """
    readers = [reader for reader in model.find_consumers(name) if reader.op_type == "QuantizeLinear"]
    if len(readers) < 2 or any(len(model.find_consumers(reader.output[0])) != 1 for reader in readers):
        return
    highest = {id(reader): _highest(model, reader) for reader in readers}
    first, *others = sorted(readers, key=lambda reader: -highest[id(reader)])
    (values,) = model.find_consumers(first.output[0])
    if values.op_type != "DequantizeLinear" or any(_is_wider_below(model, other, first) for other in others):
        return
    for other in others:
        (copy,) = model.find_consumers(other.output[0])
        if copy.op_type == "DequantizeLinear" and _same_levels(model, copy, values):
            for reader in model.find_consumers(copy.output[0]):
                reconnect(reader, copy.output[0], values.output[0])
        else:
            other.input[0] = values.output[0]
    # In an order in which they can be computed.
    for node in (values, first):
        model.graph.node.remove(node)
        position = 1 + max((i for i, n in enumerate(model.graph.node) if name in n.output), default=-1)
        model.graph.node.insert(position, node)
    model.graph.node.remove(values)
    model.graph.node.insert(1 + list(model.graph.node).index(first), values)


def _pass_levels(model: Any, node: Any) -> None:
    """Take a maximum or a concatenation of levels in the place of their values, if all have the same step."""
    given = [model.find_producer(name) for name in node.input]
    if any(values is None or values.op_type != "DequantizeLinear" for values in given):
        return
    if any(
        _constant(model, values.input[0]) is not None or not _same_levels(model, values, given[0]) for values in given
    ):
        return
    output, passed = node.output[0], f"{node.output[0]}_levels"
    behind = library("onnx").helper.make_node(
        "DequantizeLinear", [passed, *given[0].input[1:]], [output], name=f"{output}_values"
    )
    for index, values in enumerate(given):
        node.input[index] = values.input[0]
    node.output[0] = passed
    model.graph.node.insert(1 + list(model.graph.node).index(node), behind)


def _same_levels(model: Any, values: Any, others: Any) -> bool:
    """Return whether two DequantizeLinear have equal steps and zero points."""
    pairs = zip(values.input[1:3], others.input[1:3], strict=True)
    return all(np.array_equal(_constant(model, one), _constant(model, other)) for one, other in pairs)


def _keep_levels(model: Any, conv: Any) -> None:
    """Quantize what a convolution of weights 0 and 1, as of a shortcut, copies: to the levels that it reads."""
    layer = _read(model, conv.input[0], conv.input[1], conv.input[2] if len(conv.input) > 2 else "")
    readers = model.find_consumers(conv.output[0])
    if layer is None or layer.bias.any() or any(reader.op_type == "QuantizeLinear" for reader in readers):
        return
    weights = layer.weights.reshape(len(layer.steps), -1) * layer.steps[:, None]
    if not np.isin(weights, (0, 1)).all() or (weights.sum(1) > 1).any():
        return
    step, zero = _levels_behind(model, conv.input[0]).input[1:3]
    output, copied, levels = conv.output[0], f"{conv.output[0]}_copied", f"{conv.output[0]}_levels"
    conv.output[0] = copied
    make_node = library("onnx").helper.make_node
    behind = (
        make_node("QuantizeLinear", [copied, step, zero], [levels], name=levels),
        make_node("DequantizeLinear", [levels, step, zero], [output], name=f"{output}_values"),
    )
    position = 1 + list(model.graph.node).index(conv)
    for node in reversed(behind):
        model.graph.node.insert(position, node)


def _highest(model: Any, quantizer: Any) -> float:
    steps, zero = (_constant(model, name) for name in quantizer.input[1:3])
    return float(np.max((np.iinfo(zero.dtype).max - zero.astype(np.float64)) * steps))


def _is_wider_below(model: Any, quantizer: Any, other: Any) -> bool:
    """Return whether a quantizer has levels below 0 and the other has none."""
    lowest = [np.iinfo(_constant(model, node.input[2]).dtype).min for node in (quantizer, other)]
    return lowest[0] < 0 <= lowest[1]


def _fuse(model: Any, node: Any) -> None:
    if node.op_type == "Gemm" and not _is_plain(node):
        return
    layer = _read(model, node.input[0], node.input[1], node.input[2] if len(node.input) > 2 else "")
    if layer is None:
        return
    readers = model.find_consumers(node.output[0])
    norm = readers[0] if len(readers) == 1 and readers[0].op_type == "BatchNormalization" else None
    if norm is not None and not _merge(model, layer, norm):
        return
    _use_bytes(layer)
    make_room_for_bias(layer)
    accumulator = layer.input_step * layer.steps
    bias = np.round(layer.bias / accumulator).astype(np.int32)
    del node.input[1:]
    node.input.extend(
        [
            _values(model, layer.weights, layer.steps, axis=0),
            _values(model, bias, accumulator, axis=0),
        ]
    )
    if norm is not None:
        node.output[0] = norm.output[0]
        model.graph.node.remove(norm)


def _read(model: Any, given: str, weights: str, bias: str) -> Layer | None:
    """None where something is not quantized, or not from 0 on."""
    levels = _levels_behind(model, given)
    if levels is None or np.any(_constant(model, levels.input[2])):
        return None
    return _read_weights(model, weights, bias, float(_constant(model, levels.input[1])))


def _read_weights(model: Any, weights: str, bias: str, input_step: float) -> Layer | None:
    values = model.find_producer(weights)
    if values is None or values.op_type != "DequantizeLinear":
        return None
    ints, steps, zero = (_constant(model, name) for name in values.input)
    if ints is None or ints.dtype != np.int8 or np.any(zero):
        return None
    out = ints.shape[0]
    offset = _constant(model, bias) if bias else np.zeros(out)
    if offset is None:
        return None
    steps = np.broadcast_to(steps.astype(np.float64), (out,))
    return Layer(ints.copy(), steps, offset.astype(np.float64), input_step)


def _is_plain(gemm: Any) -> bool:
    """Return whether a Gemm is a linear layer as PyTorch writes it: x @ weight.T + bias."""
    factors = (attribute(gemm, "alpha", 1.0), attribute(gemm, "beta", 1.0))
    return factors == (1.0, 1.0) and not attribute(gemm, "transA", 0) and attribute(gemm, "transB", 0) == 1


def _levels_behind(model: Any, name: str) -> Any:
    """Return the DequantizeLinear that gives a tensor its levels; None if it has none."""
    producer = model.find_producer(name)
    while producer is not None and producer.op_type in _PASSING:
        producer = model.find_producer(producer.input[0])
    return producer if producer is not None and producer.op_type == "DequantizeLinear" else None


def _merge(model: Any, layer: Layer, norm: Any) -> bool:
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


def _use_bytes(layer: Layer) -> None:
    """Multiplies weights by the largest power of two that fits into int8, channel by channel, and divides their steps.

    The products are the same and the accumulator, which biases are rounded to, is finer: of 4-bit weights by 8.
    Weights whose products cannot saturate stay so.
    """
    flat = layer.weights.reshape(len(layer.weights), -1).astype(np.float64)
    if np.abs(flat).max(initial=0) <= _LARGEST_WEIGHT:
        room = _LARGEST_WEIGHT / np.abs(flat).max(1).clip(min=1)
    else:
        room = np.minimum(_INT8.max / flat.max(1).clip(min=1), _INT8.min / flat.min(1).clip(max=-1))
    _scale(layer, 2.0 ** np.floor(np.log2(room)))


def make_room_for_bias(layer: Layer) -> None:
    """Give weights whose products are tiny beside their channel's bias steps with which the bias fits into int32.

    Such weights are rounded, most of them to 0. With K weights to a channel that changes a result by at most
    K * 255 / 2 of the new accumulator's steps, of which the bias has 2^30: less than a float's last bits.
    """
    excess = np.abs(layer.bias) / (layer.input_step * layer.steps * _LARGEST_BIAS)
    _scale(layer, np.minimum(1, 1 / np.maximum(excess, 1)))


def _scale(layer: Layer, factor: Any) -> None:
    scaled = layer.weights * factor.reshape(-1, *[1] * (layer.weights.ndim - 1))
    layer.weights, layer.steps = np.round(scaled).astype(np.int8), layer.steps / factor


def _scale_steps(model: Any, product: Any) -> None:
    """Take a fixed factor of dequantized values, as attention has one, into their steps: products are integers then."""
    for name, other in (tuple(product.input), tuple(product.input)[::-1]):
        values, factor = model.find_producer(name), _constant(model, other)
        if values is None or values.op_type != "DequantizeLinear" or factor is None or factor.size != 1:
            continue
        if len(model.find_consumers(name)) == 1 and factor.item() > 0:
            step = _constant(model, values.input[1]) * factor.reshape(())
            values.input[1], values.output[0] = _new_constant(model, step), product.output[0]
            model.graph.node.remove(product)
            return


def _fuse_tokens(model: Any, product: Any) -> None:
    """Store the weights of a linear layer on tokens as it multiplies them, (in, out), and its bias as integers."""
    turn = model.find_producer(product.input[1])
    if turn is None or turn.op_type != "Transpose" or tuple(attribute(turn, "perm", [1, 0])) != (1, 0):
        return
    readers = model.find_consumers(product.output[0])
    total = readers[0] if len(readers) == 1 and readers[0].op_type == "Add" else None
    bias = "" if total is None else next((name for name in total.input if name != product.output[0]), "")
    layer = _read(model, product.input[0], turn.input[0], bias) if bias else None
    if layer is None or layer.bias.shape != layer.steps.shape:
        bias, layer = "", _read_weights(model, turn.input[0], "", 1.0)
    if layer is None or layer.weights.ndim != 2:
        return
    if bias:
        _use_bytes(layer)
        make_room_for_bias(layer)
        accumulator = layer.input_step * layer.steps
        rounded = np.round(layer.bias / accumulator).astype(np.int32)
        reconnect(total, bias, _values(model, rounded, accumulator, axis=0))
    product.input[1] = _values(model, layer.weights.T, layer.steps, axis=1)


def _use_unsigned_bytes(model: Any) -> None:
    """Store signed activations as unsigned ones around 128, with the same values: all of a kernel have one type."""
    for node in nodes_of(model, "QuantizeLinear", "DequantizeLinear"):
        if _constant(model, node.input[2]).dtype == np.int8 and _constant(model, node.input[0]) is None:
            node.input[2] = _new_constant(model, np.full_like(_constant(model, node.input[2]), _ZERO, dtype=np.uint8))
    for clip in nodes_of(model, "Clip"):
        for index, name in enumerate(clip.input[1:], 1):
            if name and (bound := _constant(model, name)).dtype == np.int8:
                clip.input[index] = _new_constant(model, (bound.astype(np.int16) + _ZERO).astype(np.uint8))


def _constant(model: Any, name: str) -> Any:
    """Return the value of a tensor that is fixed; None for others."""
    return model.get_initializer(name)


def _new_constant(model: Any, value: Any) -> str:
    name = f"fused_{len(model.graph.initializer)}"
    model.graph.initializer.append(library("onnx").numpy_helper.from_array(np.asarray(value, order="C"), name))
    return name


def _values(model: Any, ints: Any, steps: Any, *, axis: int) -> str:
    """Return the name of integers times steps along an axis."""
    zeros = np.zeros(len(steps), ints.dtype)
    inputs = [_new_constant(model, value) for value in (ints, steps.astype(np.float32), zeros)]
    output = f"{inputs[0]}_values"
    node = library("onnx").helper.make_node("DequantizeLinear", inputs, [output], name=output, axis=axis)
    model.graph.node.insert(0, node)
    return output
