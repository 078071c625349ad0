"""Reading a QONNX graph: nodes, attributes, constants, and which layer of the network a node belongs to.

The libraries that exports need, which are an extra.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qadtr_brevitas.core.extras import require


def library(name: str) -> Any:
    """Import and return a module of a library that exports need.

    Raises:
        UsageError: it is not installed.
    """
    return require(name, extra="export", purpose="export")


# Parts of a node's name that are inside a layer.
_INSIDE = ("input_quant", "weight_quant", "act_quant", "product_quant", "activation_impl", "export_handler")


def attribute(node: Any, name: str, default: Any = None) -> Any:
    """Return the value of a node's attribute."""
    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else library("onnx").helper.get_attribute_value(found)


def nodes_of(model: Any, *kinds: str) -> list[Any]:
    """Return the nodes of some kinds, in order."""
    return [node for node in model.graph.node if node.op_type in kinds]


def constant(model: Any, name: str) -> Any:
    """Return the value of a tensor that is the same for every image, quantized or not; None for others."""
    value = model.get_initializer(name)
    producer = model.find_producer(name)
    if value is None and producer is not None and producer.op_type == "Quant":
        return constant(model, producer.input[0])
    return value


def scale_of(model: Any, quant: Any) -> Any:
    """Return the steps of a Quant node."""
    return np.asarray(model.get_initializer(quant.input[1]), dtype=np.float64)


def bits_of(model: Any, quant: Any) -> int:
    """Return the bit-width of a Quant node."""
    return int(model.get_initializer(quant.input[3]))


def layer_of(node: Any) -> str:
    """Return the name of the network's module that a node was traced in, such as layer1.0.conv1.

    PyTorch writes the names of a module and of all around it, each in full where it stands in a Sequential:
    /net/layer1/layer1.0/conv1/Conv.
    """
    parts: list[str] = []
    for part in node.name.split("/")[1:-1]:
        if part.startswith(_INSIDE):
            break
        if parts and part.startswith(f"{parts[-1]}."):
            parts[-1] = part
        else:
            parts.append(part)
    # The frozen model calls the network so.
    return ".".join(parts).removeprefix("net").removeprefix(".") or "the network itself"
