"""QONNX graphs as their tools expect them: constants folded, a parameter for each reader, readable names, all shapes.

qonnx.util.cleanup does the same, but looks through the whole graph for each tensor, and sorts and copies it at every
step: minutes for a network of a hundred layers. Here each step goes through the graph once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from qadtr_brevitas.exporting.constants import fold_constants, infer_shapes, remove_unread
from qadtr_brevitas.exporting.graph import attribute, library
from qadtr_brevitas.exporting.pads import merge_pads

_COMMUTATIVE = ("Add", "Mul", "And", "Or", "Xor", "Sum")


def folded(model: Any) -> Any:
    """Return a graph without constant parts, each of whose nodes has constants of its own, last in sums and products.

    Convolutions pad themselves in it, where that is exact.

    Args:
        model: an ONNX ModelProto of standard operators and quantizers, its nodes in an order in which they can be
            computed.
    """
    fold_constants(model)
    _turn_weights(model.graph)
    remove_unread(model.graph)
    merge_pads(model)
    _give_each_reader_its_own(model.graph)
    _put_constants_last(model.graph)
    infer_shapes(model)
    return model


def cleaned(model: Any, *, input_name: str, output_name: str) -> Any:
    """Return a graph likewise, whose nodes and tensors have readable names, such as Conv_0_out0.

    Args:
        model: as for `folded`.
        input_name: what its only input is called from then on.
        output_name: what its only output is called.
    """
    model = folded(model)
    graph = model.graph
    _rename(graph, {graph.input[0].name: input_name, graph.output[0].name: output_name})
    infer_shapes(model)
    return model


def _turn_weights(graph: Any) -> None:
    """Transpose quantized constants in place of the nodes that do it for each image."""
    onnx = library("onnx")
    fixed = {tensor.name: tensor for tensor in graph.initializer}
    quants = {node.output[0]: node for node in graph.node if node.op_type == "Quant" and fixed.keys() >= {*node.input}}
    nodes: list[Any] = []
    for node in graph.node:
        quant = quants.get(node.input[0]) if node.op_type == "Transpose" else None
        if quant is None:
            nodes.append(node)
            continue
        turned = onnx.NodeProto()
        turned.CopyFrom(quant)
        turned.output[0], order = node.output[0], attribute(node, "perm")
        for index, name in enumerate(quant.input):
            value = onnx.numpy_helper.to_array(fixed[name])
            if order is None or value.ndim == len(order):
                turned.input[index] = f"{node.output[0]}_turned{index}"
                graph.initializer.append(onnx.numpy_helper.from_array(value.transpose(order), turned.input[index]))
        nodes.append(turned)
    del graph.node[:]
    graph.node.extend(nodes)


def with_own_zero_points(model: Any) -> Any:
    """Return a model of which each DequantizeLinear has a zero point of its own.

    On x86 without VNNI onnxruntime replaces weights of int8 and their zero points by those of uint8, and fails where
    two layers share one ("Attempt to replace the existing tensor", releases 1.25 to 1.32).
    """
    _give_each_reader_its_own(model.graph, lambda node, index: node.op_type == "DequantizeLinear" and index == 2)
    return model


def _give_each_reader_its_own(graph: Any, which: Callable[[Any, int], bool] = lambda node, index: True) -> None:
    """Copy constants that several nodes read, so that a tool may change what one of them reads.

    Args:
        graph: an ONNX GraphProto.
        which: whether this is about an input of a node, given by its index.
    """
    fixed, seen = {tensor.name: tensor for tensor in graph.initializer}, Counter[str]()
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in fixed and which(node, index):
                seen[name] += 1
                if seen[name] > 1:
                    copy = graph.initializer.add()
                    copy.CopyFrom(fixed[name])
                    copy.name = node.input[index] = f"{name}_copy{seen[name]}"


def _put_constants_last(graph: Any) -> None:
    """Let sums and products read constants last, where tools look for them."""
    fixed = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in _COMMUTATIVE:
            names = sorted(node.input, key=lambda name: name in fixed)
            del node.input[:]
            node.input.extend(names)


def _rename(graph: Any, own: dict[str, str]) -> None:
    """Number the nodes of each kind, and call tensors by the node that makes them or, of constants, that reads them."""
    fixed, kinds, names = {tensor.name for tensor in graph.initializer}, Counter[str](), dict[str, str]()
    for node in graph.node:
        node.name = f"{node.op_type}_{kinds[node.op_type]}"
        kinds[node.op_type] += 1
        names |= {old: f"{node.name}_out{number}" for number, old in enumerate(node.output) if old}
        parameters = [name for name in dict.fromkeys(node.input) if name in fixed]
        names |= {old: f"{node.name}_param{number}" for number, old in enumerate(parameters)}
    names |= own
    for node in graph.node:
        for tensors in (node.input, node.output):
            for index, name in enumerate(tensors):
                tensors[index] = names.get(name, name)
    for entry in (*graph.initializer, *graph.input, *graph.output):
        entry.name = names.get(entry.name, entry.name)
    for note in graph.quantization_annotation:
        note.tensor_name = names.get(note.tensor_name, note.tensor_name)
