"""The same function in the words that FPGA compilers know: exact changes of a QONNX graph.

FINN and hls4ml know no average pool and no quantizer from 0 upwards but behind a ReLU. An average is a depthwise
convolution with equal weights, and what such a quantizer sees may as well pass a ReLU first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qadtr_brevitas.exporting.graph import attribute, library, nodes_of
from qadtr_brevitas.exporting.pads import padding_of, set_padding

PIXELS = 255.0


def is_ceiled(model: Any, pool: Any) -> bool:
    """Return whether a pool has a window that reaches over the border, as `ceil_mode` allows."""
    kernel = attribute(pool, "kernel_shape")
    strides, dilations = (attribute(pool, name, [1, 1]) for name in ("strides", "dilations"))
    top, left, bottom, right = attribute(pool, "pads", [0, 0, 0, 0])
    sides, outputs = (model.get_tensor_shape(name)[2:] for name in (pool.input[0], pool.output[0]))
    full = [
        (side + pad - dilation * (width - 1) - 1) // stride + 1
        for side, pad, dilation, width, stride in zip(
            sides, (top + bottom, left + right), dilations, kernel, strides, strict=True
        )
    ]
    return bool(attribute(pool, "ceil_mode", 0)) and list(outputs) != full


def rewrite(model: Any, adapt: Callable[[Any], None]) -> None:
    """Change a qonnx ModelWrapper in place.

    Args:
        model: with all shapes, and constants folded.
        adapt: changes what its compiler alone wants otherwise, such as how it takes pixels.
    """
    changes = (_pad_explicitly, _split_pools, _replace_global_pools, _replace_average_pools, _quantize_before_flatten)
    for change in (*changes, _rectify_unsigned, adapt):
        change(model)
    model.graph.node.sort(key=_order(model))


def _pad_explicitly(model: Any) -> None:
    """Write the padding "same" as numbers of pixels; and no rounding up where it makes no difference."""
    for conv in nodes_of(model, "Conv"):
        set_padding(conv, padding_of(conv))
    for pool in nodes_of(model, "MaxPool"):
        if not is_ceiled(model, pool):
            _set_attribute(pool, "ceil_mode", 0)


def _set_attribute(node: Any, name: str, value: Any) -> None:
    for found in [found for found in node.attribute if found.name == name]:
        node.attribute.remove(found)
    node.attribute.append(library("onnx").helper.make_attribute(name, value))


def _split_pools(model: Any) -> None:
    """Give each reader of a max pool one of its own: FINN cannot turn one with several readers around."""
    for pool in nodes_of(model, "MaxPool"):
        for reader in model.find_consumers(pool.output[0])[1:]:
            shape = model.get_tensor_shape(pool.output[0])
            twin = _copy(pool, new_tensor(model, shape))
            model.graph.node.append(twin)
            reconnect(reader, pool.output[0], twin.output[0])


def _replace_global_pools(model: Any) -> None:
    for pool in nodes_of(model, "GlobalAveragePool", "ReduceMean"):
        shape = model.get_tensor_shape(pool.input[0])
        if pool.op_type == "ReduceMean" and (len(shape) != 4 or sorted(_axes(model, pool)) not in ([2, 3], [-2, -1])):
            continue
        kept = pool.op_type == "GlobalAveragePool" or attribute(pool, "keepdims", 1)
        factor = _take_factor(model, pool)
        output = pool.output[0] if kept else new_tensor(model, [*shape[:2], 1, 1])
        _average(model, pool, output, kernel=shape[2:], strides=[1, 1], pads=[0, 0, 0, 0], factor=factor)
        if not kept:
            model.graph.node.append(new_node("Flatten", [output], pool.output[0], axis=1))


def _axes(model: Any, pool: Any) -> list[int]:
    given = model.get_initializer(pool.input[1]) if len(pool.input) > 1 else attribute(pool, "axes", [])
    return [int(axis) for axis in given]


def _replace_average_pools(model: Any) -> None:
    for pool in nodes_of(model, "AveragePool"):
        pads = list(attribute(pool, "pads", [0, 0, 0, 0]))
        if is_ceiled(model, pool) or (any(pads) and not attribute(pool, "count_include_pad", 0)):
            continue
        kernel, strides = attribute(pool, "kernel_shape"), attribute(pool, "strides", [1, 1])
        factor = _take_factor(model, pool)
        _average(model, pool, pool.output[0], kernel=kernel, strides=strides, pads=pads, factor=factor)


def factor_behind(model: Any, pool: Any) -> tuple[float, Any]:
    """Return the fixed factor that alone reads a pool's result, as `divisor_override` leaves one, and its node.

    Returns:
        1 and None where there is none, or not a positive one.
    """
    readers = model.find_consumers(pool.output[0])
    if len(readers) == 1 and readers[0].op_type == "Mul":
        values = [model.get_initializer(name) for name in readers[0].input]
        factor = next((float(value) for value in values if value is not None and value.size == 1), 0.0)
        if factor > 0:
            return factor, readers[0]
    return 1.0, None


def _take_factor(model: Any, pool: Any) -> float:
    """Take the factor behind a pool out of the graph, and return it: hls4ml cannot merge it into an average."""
    factor, product = factor_behind(model, pool)
    if product is not None:
        model.graph.node.remove(product)
        pool.output[0] = product.output[0]
    return factor


def _average(
    model: Any,
    pool: Any,
    output: str,
    *,
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    factor: float,
) -> None:
    """Put a depthwise convolution with 2-bit weights of one level in the place of a pool, times a factor."""
    channels = model.get_tensor_shape(pool.input[0])[1]
    step = factor / math.prod(kernel)
    weight = new_tensor(model, [channels, 1, *kernel], np.full([channels, 1, *kernel], step))
    settings = [new_tensor(model, [], np.array(value)) for value in (step, 0.0, 2.0)]
    quantized = new_tensor(model, [channels, 1, *kernel])
    quant = new_node("Quant", [weight, *settings], quantized, signed=1, narrow=1, rounding_mode="ROUND")
    quant.domain = _quant_domain(model)
    geometry = {"kernel_shape": kernel, "strides": strides, "pads": pads, "dilations": [1, 1], "group": channels}
    conv = new_node("Conv", [pool.input[0], quantized], output, **geometry)
    model.graph.node.remove(pool)
    model.graph.node.extend([quant, conv])


def _quant_domain(model: Any) -> str:
    return next((node.domain for node in nodes_of(model, "Quant")), "qonnx.custom_op.general")


def _quantize_before_flatten(model: Any) -> None:
    """Has the compilers find a Flatten where they look for it, in front of a linear layer."""
    for flatten in nodes_of(model, "Flatten", "Reshape"):
        readers = model.find_consumers(flatten.output[0])
        if len(readers) != 1 or readers[0].op_type != "Quant" or model.get_initializer(flatten.input[0]) is not None:
            continue
        (quant,) = readers
        quantized = new_tensor(model, model.get_tensor_shape(flatten.input[0]))
        quant.input[0], flatten.input[0] = flatten.input[0], quantized
        flatten.output[0], quant.output[0] = quant.output[0], quantized


def _rectify_unsigned(model: Any) -> None:
    for quant in nodes_of(model, "Quant"):
        producer = model.find_producer(quant.input[0])
        is_weight = producer is None and model.get_initializer(quant.input[0]) is not None
        if attribute(quant, "signed") or is_weight or (producer is not None and producer.op_type == "Relu"):
            continue
        rectified = new_tensor(model, model.get_tensor_shape(quant.input[0]))
        model.graph.node.append(new_node("Relu", [quant.input[0]], rectified))
        quant.input[0] = rectified


def new_tensor(model: Any, shape: Sequence[int], value: Any = None) -> str:
    """Return the name of a new tensor of float32, fixed if a value is given."""
    name = model.make_new_valueinfo_name()
    model.set_tensor_shape(name, list(shape))
    if value is not None:
        model.set_initializer(name, value.astype(np.float32))
    return name


def new_node(kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> Any:
    """Return a node of standard ONNX, named after its output."""
    return library("onnx").helper.make_node(kind, list(inputs), [output], name=f"{kind}_{output}", **attributes)


def _copy(node: Any, output: str) -> Any:
    twin = type(node)()
    twin.CopyFrom(node)
    twin.name, twin.output[0] = f"{node.name}_{output}", output
    return twin


def reconnect(node: Any, old: str, new: str) -> None:
    """Let a node read another tensor in place of one of its inputs."""
    for index, name in enumerate(node.input):
        if name == old:
            node.input[index] = new


def _order(model: Any) -> Callable[[Any], int]:
    """Return a key by which each node comes after all that it reads."""
    producers = {output: node for node in model.graph.node for output in node.output}
    ranks: dict[str, int] = {}

    def rank(name: str) -> int:
        pending = [name]
        while pending:
            current = pending[-1]
            node = producers.get(current)
            missing = [i for i in node.input if i not in ranks] if node is not None else []
            if missing:
                pending.extend(missing)
                continue
            ranks[current] = 0 if node is None else 1 + max((ranks[i] for i in node.input), default=0)
            pending.pop()
        return ranks[name]

    return lambda node: rank(node.output[0])
