"""Makes an hls4ml project of an exported folder and runs its bit-accurate emulation; needs hls4ml and g++.

    python hls4ml_build.py [FOLDER] [RESULT.json] [--output PROJECT]

Settings are those of the folder's hls4ml_config.json. Images are NHWC there, as in the hardware.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

# hls4ml computes exactly, but for the last bits of fixed<48,16>.
_TOLERANCE = 1e-4
# Bytes. VGG-16's largest layer takes more than the 8 MiB that a process has.
_STACK = 1 << 29
_CHANNELS_LAST = (0, 2, 3, 1)
_DOMAIN = "qonnx.custom_op.channels_last"
_IMAGE_NODES = ("Conv", "MaxPool", "BatchNormalization")


def main() -> None:
    """Read the arguments, convert, compile, and compare with expected_output.npy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent)
    parser.add_argument("result", type=Path, nargs="?")
    parser.add_argument("--output", type=Path, help="keep the project here")
    given = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="hls4ml-"))
    try:
        result = _build(given.folder.resolve(), given.output or scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    text = json.dumps(result, indent=2)
    print(text) if given.result is None else given.result.write_text(text)
    if result["difference"] > _TOLERANCE * result["largest"]:
        sys.exit(f"the emulation differs from expected_output.npy by {result['difference']:g} of {result['largest']:g}")


def _build(folder: Path, output: Path) -> dict[str, Any]:
    numpy, hls4ml = import_module("numpy"), import_module("hls4ml")
    settings = json.loads((folder / "hls4ml_config.json").read_text())
    model = _channels_last(folder / "model.onnx")
    layers = hls4ml.utils.config.config_from_onnx_model(
        model, granularity="name", backend=settings["backend"], default_precision=settings["default_precision"]
    )
    project = hls4ml.converters.convert_from_onnx_model(
        model,
        output_dir=str(output),
        project_name="network",
        io_type=settings["io_type"],
        backend=settings["backend"],
        part=settings["part"],
        clock_period=settings["clock_period_ns"],
        hls_config=layers,
    )
    project.compile()
    images, expected = numpy.load(folder / "input.npy"), numpy.load(folder / "expected_output.npy")
    channels_last = numpy.ascontiguousarray(images.transpose(0, 2, 3, 1))
    found = numpy.asarray(_with_room(lambda: project.predict(channels_last))).reshape(expected.shape)
    return {
        "version": version("hls4ml"),
        "difference": float(abs(found - expected).max()),
        "largest": float(abs(expected).max()),
        "same_class": float((found.argmax(1) == expected.argmax(1)).mean()),
    }


def _with_room(compute: Callable[[], Any]) -> Any:
    """Return what a function computes on a large stack, where the emulation has the weights of a whole layer."""
    threading.stack_size(_STACK)
    with ThreadPoolExecutor(1) as one:
        return one.submit(compute).result()


def _channels_last(path: Path) -> Any:
    """Return the graph with channels last everywhere; qonnx's own conversion errs where a tensor forks."""
    cleanup = import_module("qonnx.util.cleanup").cleanup_model
    to_matmul = import_module("qonnx.transformation.gemm_to_matmul").GemmToMatMul
    model = cleanup(import_module("qonnx.core.modelwrapper").ModelWrapper(str(path)))
    model = cleanup(model.transform(to_matmul()))
    _turn_weights_behind_flatten(model)
    shapes = {name: model.get_tensor_shape(name) for name in model.get_all_tensor_names()}
    for name, shape in shapes.items():
        if shape is None or len(shape) != 4:
            continue
        if (value := model.get_initializer(name)) is not None:
            model.set_initializer(name, value.transpose(_CHANNELS_LAST))
        else:
            model.set_tensor_shape(name, [shape[axis] for axis in _CHANNELS_LAST])
    for node in model.graph.node:
        if node.op_type in _IMAGE_NODES and len(shapes[node.output[0]]) == 4:
            node.domain = _DOMAIN
    opsets = model.get_opset_imports()
    model.model.opset_import.append(import_module("onnx").helper.make_opsetid(_DOMAIN, opsets[""]))
    return model


def _turn_weights_behind_flatten(model: Any) -> None:
    """Put the rows of a linear layer that reads a flattened image into the order of channels last."""
    for node in [found for found in model.graph.node if found.op_type in ("Flatten", "Reshape")]:
        shape = model.get_tensor_shape(node.input[0])
        if len(shape) != 4 or shape[2:] == [1, 1]:
            continue
        product = model.find_consumers(node.output[0])[0]
        # Exports have one linear layer there, behind quantizers and ReLUs.
        while product.op_type in ("Quant", "Relu"):
            product = model.find_consumers(product.output[0])[0]
        name = model.find_producer(product.input[1]).input[0]
        weight = model.get_initializer(name)
        rows = weight.reshape(*shape[1:], -1).transpose(1, 2, 0, 3)
        model.set_initializer(name, rows.reshape(weight.shape))


if __name__ == "__main__":
    main()
