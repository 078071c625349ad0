"""Which layers of a file onnxruntime computes in integers, and what keeps the others."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qadtr_brevitas.exporting.fuse import LAYERS, obstacle
from qadtr_brevitas.exporting.graph import layer_of, library, nodes_of

_INTEGER = ("QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat")
_FLOAT = (*LAYERS, "FusedConv", "FusedGemm", "FusedMatMul")


@dataclass(frozen=True)
class IntegerLayers:
    """What onnxruntime makes of the layers of a file.

    Args:
        integer: how many convolutions, linear layers and matrix products it computes in integers.
        layers: how many there are.
        kept: the names of the others, and why.
    """

    integer: int
    layers: int
    kept: Mapping[str, str]


def integer_layers(path: Path) -> IntegerLayers:
    """Count the integer kernels that onnxruntime puts into a file that `fuse` made."""
    wrapper = library("qonnx.core.modelwrapper").ModelWrapper
    with tempfile.TemporaryDirectory() as folder:
        optimized = wrapper(str(_optimized(path, Path(folder))))
    written = wrapper(str(path))
    reasons = {node.name: obstacle(written, node) for node in nodes_of(written, *LAYERS)}
    integer, others = len(nodes_of(optimized, *_INTEGER)), nodes_of(optimized, *_FLOAT)
    kept = {layer_of(node): reasons.get(node.name) or "onnxruntime has no integer kernel for it" for node in others}
    return IntegerLayers(integer, integer + len(others), kept)


def _optimized(path: Path, folder: Path) -> Path:
    runtime: Any = library("onnxruntime")
    options = runtime.SessionOptions()
    # It warns that an optimized file is for the same processor.
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return folder / "optimized.onnx"
