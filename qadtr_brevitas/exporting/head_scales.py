"""Steps per attention head outside of QuantizeLinear: onnxruntime's integer products take one step of a tensor only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from qadtr_brevitas.exporting.graph import library

# (images, heads, tokens, features).
_SHAPE = (1, -1, 1, 1)


def move_steps_outside(model: Any) -> Any:
    """Divide by the steps before QuantizeLinear, and multiply after DequantizeLinear; the same numbers come out.

    Args:
        model: an onnx model, changed in place. Weights stay as they are.

    Returns:
        The model.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[Any] = []
    moved: dict[str, str] = {}
    for node in graph.node:
        scale = constants.get(node.input[1]) if node.op_type == "QuantizeLinear" else None
        steps = f"{node.name}_steps"
        if scale is not None and node.input[0] not in constants and math.prod(scale.dims) > 1:
            values = library("onnx").numpy_helper.to_array(scale).reshape(_SHAPE)
            graph.initializer.append(_constant(steps, values))
            nodes.append(_node("Div", [node.input[0], steps], f"{node.name}_in_steps"))
            node.input[0] = nodes[-1].output[0]
            _use_step_of_one(graph, constants, node)
            moved[node.output[0]] = steps
        nodes.append(node)
        if node.op_type == "Clip" and node.input[0] in moved:
            moved[node.output[0]] = moved[node.input[0]]
        if node.op_type == "DequantizeLinear" and node.input[0] in moved:
            _use_step_of_one(graph, constants, node)
            output, node.output[0] = node.output[0], f"{node.output[0]}_in_steps"
            nodes.append(_node("Mul", [node.output[0], moved[node.input[0]]], output))
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _use_step_of_one(graph: Any, constants: dict[str, Any], node: Any) -> None:
    """Let a QuantizeLinear or DequantizeLinear have the step 1 and one zero point."""
    one, zero = f"{node.name}_one", f"{node.name}_zero"
    graph.initializer.append(_constant(one, np.float32(1)))
    node.input[1] = one
    if len(node.input) > 2 and node.input[2]:
        points = library("onnx").numpy_helper.to_array(constants[node.input[2]])
        graph.initializer.append(_constant(zero, points.reshape(-1)[0]))
        node.input[2] = zero
    for attribute in [each for each in node.attribute if each.name == "axis"]:
        node.attribute.remove(attribute)


def _constant(name: str, value: Any) -> Any:
    return library("onnx").numpy_helper.from_array(np.asarray(value), name)


def _node(kind: str, inputs: Sequence[str], output: str) -> Any:
    return library("onnx").helper.make_node(kind, list(inputs), [output], name=f"{kind}_{output}")
