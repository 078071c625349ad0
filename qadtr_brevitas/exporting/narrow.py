"""Weights of few bits as integers of 4 bit, two to a byte, which ONNX has from opset 21 on.

ONNX has integers of 2 bit too, from opset 25 on, but other runtimes than onnxruntime do not read them yet (OpenVINO
2026.4 does not), so that weights of 2 and 3 bit take 4.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qadtr_brevitas.exporting.graph import library

_OPSET = 21
_LOW, _HIGH = -8, 7


def narrow_weights(model: Any) -> Any:
    """Return a model whose weights of up to 4 bit are stored as int4, or the same model where that is not possible.

    Args:
        model: an ONNX ModelProto in which weights are int8 that DequantizeLinear reads.
    """
    onnx = library("onnx")
    if not _narrow(model.graph):
        return model
    try:
        narrowed = onnx.version_converter.convert_version(model, _OPSET)
    # Operators that the converter does not know; it raises RuntimeError, and what its parts raise.
    except Exception:
        return model
    narrowed.ir_version = model.ir_version
    values = {tensor.name: tensor for tensor in narrowed.graph.initializer}
    for node, weight in _narrow(narrowed.graph):
        ints = onnx.numpy_helper.to_array(weight)
        replaced = [_int4(f"{weight.name}_int4", ints)]
        node.input[0] = replaced[0].name
        if len(node.input) > 2 and node.input[2]:
            zeros = onnx.numpy_helper.to_array(values[node.input[2]])
            replaced.append(_int4(f"{weight.name}_zero", zeros))
            node.input[2] = replaced[1].name
        narrowed.graph.initializer.extend(replaced)
    _remove_unread_constants(narrowed.graph)
    return narrowed if _loads(narrowed) else model


def _narrow(graph: Any) -> list[tuple[Any, Any]]:
    """Return the DequantizeLinear nodes of constants that fit into 4 bit, and these constants."""
    onnx = library("onnx")
    constants = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    found: list[tuple[Any, Any]] = []
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and (weight := constants.get(node.input[0])) is not None and weight.dims:
            ints = onnx.numpy_helper.to_array(weight)
            if ints.size and ints.min() >= _LOW and ints.max() <= _HIGH:
                found.append((node, weight))
    return found


def _int4(name: str, ints: Any) -> Any:
    onnx = library("onnx")
    values = ints.astype(np.int8).view(np.uint8).reshape(-1) & 0xF
    pairs = np.append(values, np.zeros(len(values) % 2, np.uint8)).reshape(-1, 2)
    # The first of two is the lower half of a byte.
    packed = (pairs[:, 0] | pairs[:, 1] << 4).astype(np.uint8)
    return onnx.helper.make_tensor(name, onnx.TensorProto.INT4, ints.shape, packed.tobytes(), raw=True)


def _remove_unread_constants(graph: Any) -> None:
    read = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _loads(model: Any) -> bool:
    """Return whether onnxruntime takes a model with all its optimizations.

    That of 1.32 makes a wrong node of some linear layers on tokens from opset 21 on.
    """
    runtime: Any = library("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    try:
        runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    # It raises exceptions of its own, which have no common base.
    except Exception:
        return False
    return True
