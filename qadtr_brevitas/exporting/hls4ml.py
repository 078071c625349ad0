"""The format for hls4ml: QONNX with steps that are powers of two, with settings and a build script."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qadtr_brevitas.core.files import write_json
from qadtr_brevitas.exporting.compiler import CLOCK_NS, BuildTarget, Compiler
from qadtr_brevitas.exporting.formats import Format
from qadtr_brevitas.exporting.graph import attribute, nodes_of, scale_of
from qadtr_brevitas.exporting.onnx_files import load_qonnx, writer_for
from qadtr_brevitas.exporting.rewrite import new_node, new_tensor

_SCRIPTS = Path(__file__).parent / "compilers"


class Hls4ml(Compiler):
    """hls4ml, which makes C++ for high-level synthesis, in fixed point."""

    name = "hls4ml"
    package = "hls4ml"
    variable = "QADTR_BREVITAS_HLS4ML"
    script = "hls4ml_build.py"
    power_of_two = True
    averages_floats = True
    options = ("part",)

    def limits(self, model: Any, node: Any) -> Iterator[str]:
        if node.op_type == "MaxPool":
            kernel = attribute(node, "kernel_shape")
            if attribute(node, "strides", [1, 1]) != kernel or any(attribute(node, "pads", [0])):
                yield "a max pool with a stride other than its kernel, or with padding: pool without overlap"
        elif node.op_type == "Conv":
            if max(attribute(node, "dilations", [1])) > 1:
                yield "a convolution with dilation: leave dilation out"
            _, channels, *size = model.get_tensor_shape(node.output[0])
            # hls4ml 1.3.0 then takes a side for the channels ("operands could not be broadcast together").
            if attribute(node, "group", 1) == channels > 1 and channels in size:
                yield f"a depthwise convolution of {channels} channels to {channels} pixels: use images of another size"
        elif _flattens_pixels(model, node):
            readers = [reader.op_type for reader in _readers_behind(model, node.output[0])]
            # hls4ml 1.3.0 then computes other logits.
            if len(readers) > 1:
                yield "several layers read a flattened image: pool to one pixel before nn.Flatten"
            for kind in sorted(set(readers) - {"Gemm", "MatMul"}):
                yield f"{kind} on a flattened image: put a linear layer first, or pool to one pixel before nn.Flatten"

    def adapt(self, model: Any) -> None:
        """Normalize pixels, (x - mean) / std, as one BatchNorm, which hls4ml can turn to channels last.

        Biases behind weights of several steps become offsets of BatchNorms.
        """
        for conv in nodes_of(model, "Conv"):
            quant = model.find_producer(conv.input[1])
            if len(conv.input) > 2 and scale_of(model, quant).size > 1:
                _take_bias(model, conv)
        (subtract,) = model.find_consumers(model.graph.input[0].name)
        (divide,) = model.find_consumers(subtract.output[0])
        assert (subtract.op_type, divide.op_type) == ("Sub", "Div")
        mean, std = (model.get_initializer(node.input[1]).reshape(-1) for node in (subtract, divide))
        values = (np.ones_like(mean), np.zeros_like(mean), mean, std**2)
        inputs = [subtract.input[0], *(new_tensor(model, value.shape, value) for value in values)]
        norm = new_node("BatchNormalization", inputs, divide.output[0], epsilon=0.0)
        model.graph.node.remove(subtract)
        model.graph.node.remove(divide)
        model.graph.node.append(norm)

    def write_build_files(self, folder: Path, model_file: Path, build: BuildTarget) -> None:
        settings = {
            "backend": "Vitis",
            "io_type": "io_stream",
            # Narrower ones round BatchNorm's factors until activations flip.
            "default_precision": "fixed<48,16>",
            "part": build.part,
            "clock_period_ns": CLOCK_NS,
        }
        write_json(folder / "hls4ml_config.json", settings)
        shutil.copy(_SCRIPTS / self.script, folder / "build.py")
        (folder / "README.md").write_text(_README)


def _take_bias(model: Any, conv: Any) -> None:
    """Take the bias of a convolution into the BatchNorm behind it, or into a new one: hls4ml adds none to such sums."""
    bias = model.get_initializer(conv.input[2])
    del conv.input[2]
    readers = model.find_consumers(conv.output[0])
    if [reader.op_type for reader in readers] == ["BatchNormalization"]:
        mean = readers[0].input[3]
        model.set_initializer(mean, model.get_initializer(mean) - bias)
        return
    values = (np.ones_like(bias), bias, np.zeros_like(bias), np.ones_like(bias))
    sums, output = new_tensor(model, model.get_tensor_shape(conv.output[0])), conv.output[0]
    conv.output[0] = sums
    inputs = [sums, *(new_tensor(model, value.shape, value) for value in values)]
    model.graph.node.append(new_node("BatchNormalization", inputs, output, epsilon=0.0))


def _flattens_pixels(model: Any, node: Any) -> bool:
    """Return whether a node makes one row of the channels and pixels of an image, whose order is another there."""
    if node.op_type not in ("Flatten", "Reshape"):
        return False
    before, after = (model.get_tensor_shape(name) for name in (node.input[0], node.output[0]))
    return len(before) == 4 and before[2:] != [1, 1] and len(after) == 2


def _readers_behind(model: Any, name: str) -> Iterator[Any]:
    for reader in model.find_consumers(name):
        if reader.op_type in ("Quant", "Relu"):
            yield from _readers_behind(model, reader.output[0])
        else:
            yield reader


_README = """\
# A network for hls4ml

`model.onnx` is QONNX, with steps that are powers of two. It takes one image, (1, 3, height, width) from 0 to 1 (with
channels last in the hardware), and gives logits; the normalization of pixels is part of it.

Where hls4ml 1.3, qonnx 1.0 and g++ are installed,

    python build.py --output project

makes a project, emulates it bit by bit on `input.npy`, and compares with `expected_output.npy`. Settings are those of
`hls4ml_config.json`. With Vitis HLS installed, `project/build_prj.tcl` synthesizes it.
"""

_COMPILER = Hls4ml()
HLS4ML = Format(
    name=_COMPILER.name,
    help="a folder to build with hls4ml",
    max_bits=8,
    write=writer_for(_COMPILER),
    load=load_qonnx,
    target="hls4ml",
    compiler=_COMPILER,
)
