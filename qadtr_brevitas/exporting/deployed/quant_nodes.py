"""Quantizers of QONNX files as the standard operators that they stand for, so that onnxruntime runs the file.

It needs onnx, which reads the file, and numpy. The numbers are those of qonnx, which computes a file node by node, in
seconds for an image of 224x224 pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx  # pyright: ignore[reportMissingImports]

_ROUNDING = {"ROUND": "Round", "FLOOR": "Floor", "CEIL": "Ceil"}


def load_standard(path: Path) -> Any:
    """Return the model of a file, an onnx ModelProto of standard operators alone.

    Raises:
        ValueError: the file has nodes that are neither standard nor quantizers of fixed ranges.
    """
    model: Any = onnx.load(str(path))
    graph = model.graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    quants = [node for node in graph.node if node.domain not in ("", "ai.onnx")]
    standard: dict[int, list[Any]] = {id(node): list(_standard(graph, node, values)) for node in quants}
    nodes = [part for node in graph.node for part in standard.get(id(node), [node])]
    del graph.node[:]
    graph.node.extend(nodes)
    # onnxruntime warns of each constant that nothing reads.
    read = {name for node in nodes for name in node.input}
    constants = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(constants)
    kept = [entry for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    return model


def _standard(graph: Any, node: Any, values: dict[str, Any]) -> Iterator[Any]:
    """Yield the operators of a quantizer; one of a constant is computed, and added to the graph's constants."""
    source, *others = node.input
    if node.op_type != "Quant" or not all(name in values for name in others):
        raise ValueError(f"{node.name} ({node.op_type}) is no quantizer of a fixed range: run the file with qonnx")
    step, zero, bits = (values[name].astype(np.float32) for name in others)
    facts = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
    low, high = _range(int(bits), signed=bool(facts["signed"]), narrow=bool(facts["narrow"]))
    rounding = _ROUNDING[facts.get("rounding_mode", b"ROUND").decode().upper()]
    output = node.output[0]
    if source in values:
        levels = np.clip(values[source] / step + zero, low, high)
        rounded = {"Round": np.round, "Floor": np.floor, "Ceil": np.ceil}[rounding](levels)
        graph.initializer.append(onnx.numpy_helper.from_array((rounded - zero) * step, output))
        return
    names = {name: f"{output}_{name}" for name in ("step", "zero", "low", "high")}
    fixed = {"step": step, "zero": zero, "low": np.float32(low), "high": np.float32(high)}
    graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(fixed[key]), names[key]) for key in names)
    chain = [("Div", "step"), ("Clip", "low", "high"), (rounding,), ("Mul", "step")]
    if zero.any():
        chain = [chain[0], ("Add", "zero"), *chain[1:3], ("Sub", "zero"), chain[3]]
    for number, (kind, *constants) in enumerate(chain):
        target = output if number == len(chain) - 1 else f"{output}_{number}"
        yield onnx.helper.make_node(kind, [source, *(names[key] for key in constants)], [target])
        source = target


def _range(bits: int, *, signed: bool, narrow: bool) -> tuple[int, int]:
    """Return the lowest and the highest level."""
    if signed:
        return -(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1
    return 0, 2**bits - 1 - narrow
