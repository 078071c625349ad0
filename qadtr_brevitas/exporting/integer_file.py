"""The format `integers`: model.safetensors and model.json, and for small networks model.h in C.

model.json lists the operations in order, each with the layer that it is from, its inputs, its output, the output's
shape for one image and the bits that its integers take; docs/formats.md describes them. model.safetensors holds the
weights packed at their bits, their steps, and the multipliers and offsets of `combine`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn

from qadtr_brevitas.exporting.c_header import LARGEST_WEIGHTS, write_header
from qadtr_brevitas.exporting.constants import fold_constants
from qadtr_brevitas.exporting.deployed.integers import IntegerNetwork
from qadtr_brevitas.exporting.formats import Classifier, Format
from qadtr_brevitas.exporting.graph import library
from qadtr_brevitas.exporting.integer_graph import INPUT, Translation
from qadtr_brevitas.exporting.onnx_files import export_qonnx, exporting
from qadtr_brevitas.exporting.pads import merge_pads
from qadtr_brevitas.exporting.rewrite import PIXELS

INTEGERS_FILE, INTEGERS_RUNNER = "model.safetensors", "integers.py"
HEADER_FILE = "model.h"
_FORMAT = 1


def write_integers(frozen: nn.Module, images: Tensor, path: Path) -> None:
    """Write a frozen network in integers.

    Args:
        frozen: a frozen model below 32 bit.
        images: of the size that it takes, (n, C, H, W).
        path: model.safetensors; model.json and model.h are written beside it.

    Raises:
        ExportError: a layer computes what integers have no operation for; nothing is written then.
    """
    scratch = path.with_suffix(".onnx")
    try:
        with exporting():
            model = export_qonnx(frozen, images[:1], scratch)
            model.model = merge_pads(fold_constants(model.model))
            model = model.transform(library("qonnx.transformation.infer_shapes").InferShapes())
            found = Translation(model)
    finally:
        scratch.unlink(missing_ok=True)
    program = found.program
    (term,) = found.output.terms
    graph = {
        "format": _FORMAT,
        "input": {"tensor": INPUT, "shape": list(found.shape), "range": [0, int(PIXELS)], "scale": 1 / PIXELS},
        "output": {"tensor": term.tensor, "shape": list(found.output.shape), "step": float(term.scale[0])},
        "weights": program.weights,
        "levels": program.levels,
        "operations": program.operations,
    }
    save_file({name: np.ascontiguousarray(array) for name, array in program.tensors.items()}, path)
    path.with_suffix(".json").write_text(json.dumps(graph, indent=1) + "\n", encoding="utf-8")
    network = IntegerNetwork(path)
    if sum(weights.size for weights in network.weights.values()) <= LARGEST_WEIGHTS:
        write_header(network, path.with_name(HEADER_FILE))


def load_integers(path: Path) -> Classifier:
    """Return what a file computes, in integers, by numpy."""
    network = IntegerNetwork(path)

    def classify(images: Tensor) -> Tensor:
        pixels = (images * PIXELS).round().cpu().numpy()
        return torch.from_numpy(np.concatenate([network.run(part) for part in np.array_split(pixels, len(pixels))]))

    return classify


INTEGERS = Format(
    name="integers",
    help="weights packed at their bits, and the operations between integers that make the network",
    max_bits=16,
    write=write_integers,
    write_dynamic=write_integers,
    load=load_integers,
    takes_bytes=True,
    file=INTEGERS_FILE,
    runtimes=f"numpy ({INTEGERS_RUNNER}), C (model.h, where the network is small), and what you write from model.json",
)
