"""What is the same for every image is computed once, when a graph is written."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np

from qadtr_brevitas.exporting.graph import attribute, library

_STANDARD = ("", "ai.onnx")
# Larger constants are no sizes, which shapes could depend on.
_MOST_SIZES = 64


def fold_constants(model: Any, *, keep: Collection[str] = ()) -> Any:
    """Compute, in place, what reads constants alone or only shapes, and remove identities; return the model.

    Args:
        model: an ONNX ModelProto of standard operators and quantizers, its nodes in an order in which they can be
            computed.
        keep: kinds of nodes that stay, and with them all that reads them.
    """
    while True:
        # Sizes that were computed are known once the nodes that computed them are folded.
        infer_shapes(model)
        count = len(model.graph.node)
        _fold_shapes(model.graph)
        _fold(model, keep)
        remove_identities(model.graph)
        remove_unread(model.graph)
        if len(model.graph.node) == count:
            return model


def infer_shapes(model: Any) -> None:
    """Write the shape of every tensor into a graph in place; other nodes than standard ones keep that of their input.

    Args:
        model: as for `fold_constants`.
    """
    onnx, graph = library("onnx"), model.graph
    plain = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    plain.graph.name = graph.name
    plain.graph.node.extend(graph.node)
    plain.graph.input.extend(graph.input)
    plain.graph.output.extend(graph.output)
    for tensor in graph.initializer:
        if math.prod(tensor.dims) > _MOST_SIZES:
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            plain.graph.input.append(value)
        else:
            plain.graph.initializer.append(tensor)
    for node in plain.graph.node:
        if node.domain not in _STANDARD:
            node.op_type, node.domain = "Identity", ""
            del node.input[1:]
            del node.attribute[:]
    found = onnx.shape_inference.infer_shapes(plain, data_prop=True)
    del graph.value_info[:]
    graph.value_info.extend(found.graph.value_info)
    for output, known in zip(graph.output, found.graph.output, strict=True):
        output.CopyFrom(known)


def _fold_shapes(graph: Any) -> None:
    """Compute shapes that are known, and known sizes that are picked from others."""
    shapes, to_array = _shapes(graph), library("onnx").numpy_helper.to_array
    sizes: dict[str, list[int | None]] = {}
    fixed = {tensor.name: tensor for tensor in graph.initializer}
    for node in list(graph.node):
        found: Any = None
        if node.op_type == "Shape" and node.input[0] in shapes:
            shape = shapes[node.input[0]]
            found = sizes[node.output[0]] = shape[attribute(node, "start", 0) : attribute(node, "end", len(shape))]
        elif node.op_type == "Gather" and node.input[0] in sizes and (index := fixed.get(node.input[1])) is not None:
            found = np.array(sizes[node.input[0]], dtype=object)[to_array(index)]
        if found is not None and None not in np.ravel(found):
            dims = np.array(found, dtype=np.int64)
            graph.initializer.append(library("onnx").numpy_helper.from_array(dims, node.output[0]))
            graph.node.remove(node)


def _shapes(graph: Any) -> dict[str, list[int | None]]:
    """Return the shapes of tensors, None for each size that is not known."""
    shapes: dict[str, list[int | None]] = {}
    for value in (*graph.value_info, *graph.input):
        kind = value.type.tensor_type
        if kind.HasField("shape"):
            shapes[value.name] = [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim]
    return shapes


def _fold(model: Any, keep: Collection[str]) -> None:
    """Compute all nodes that read constants alone, in one pass."""
    onnx, graph = library("onnx"), model.graph
    fixed = {tensor.name for tensor in graph.initializer}
    folded: list[Any] = []
    stays: list[Any] = []
    for node in graph.node:
        is_fixed = node.op_type not in keep and node.domain == "" and fixed.issuperset(filter(None, node.input))
        (folded if is_fixed else stays).append(node)
        if is_fixed:
            fixed.update(node.output)
    read = {name for node in stays for name in node.input} | {output.name for output in graph.output}
    wanted = [name for node in folded for name in node.output if name in read]
    if wanted:
        outputs = [onnx.helper.make_empty_tensor_value_info(name) for name in wanted]
        part = onnx.helper.make_graph(folded, "constants", [], outputs, graph.initializer)
        options = {"opset_imports": model.opset_import, "ir_version": model.ir_version}
        evaluator = library("onnx.reference").ReferenceEvaluator(onnx.helper.make_model(part, **options))
        values = zip(wanted, evaluator.run(None, {}), strict=True)
        graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in values)
    del graph.node[:]
    graph.node.extend(stays)


def remove_identities(graph: Any) -> None:
    """Let the readers of an Identity read what it reads, unless the graph's own output is one."""
    outputs = {output.name for output in graph.output}
    names: dict[str, str] = {}
    kept: list[Any] = []
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)
        if node.op_type == "Identity" and node.output[0] not in outputs:
            names[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


def remove_unread(graph: Any) -> None:
    """Remove nodes and constants that nothing reads."""
    wanted = {output.name for output in graph.output}
    kept: list[Any] = []
    for node in reversed(graph.node):
        if not wanted.isdisjoint(node.output):
            kept.append(node)
            wanted.update(node.input)
    constants = [tensor for tensor in graph.initializer if tensor.name in wanted]
    del graph.node[:]
    del graph.initializer[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(constants)
