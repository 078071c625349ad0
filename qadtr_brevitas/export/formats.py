"""The formats a frozen model is written in, and what executes them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qadtr_brevitas.export.libraries import library

if TYPE_CHECKING:
    from collections.abc import Generator

MODEL_FILE = "model.onnx"
# The newest IR that the onnxruntime of the same time reads, whichever onnx wrote the file.
_IR_VERSION = 10
# Reduces to the operators that every compiler here knows.
_OPSET = 17

Classifier = Callable[[Tensor], Tensor]
"""Images (N, 3, H, W) in [0, 1] to logits (N, classes)."""


@dataclass(frozen=True)
class Format:
    """One way to write a network.

    Args:
        name: what it is called on the command line.
        help: what it is for, in one line.
        max_bits: the most bits a weight or activation may have.
        write: writes the frozen model, traced on one image, to a file.
        load: gives what the file computes.
    """

    name: str
    help: str
    max_bits: int
    write: Callable[[nn.Module, Tensor, Path], None]
    load: Callable[[Path], Classifier]


def _write_qonnx(frozen: nn.Module, image: Tensor, path: Path) -> None:
    """QONNX as Brevitas exports it, with the graph cleaned by qonnx."""
    wrapper, cleanup = library("qonnx.core.modelwrapper"), library("qonnx.util.cleanup")
    with _exporting():
        library("brevitas.export").export_qonnx(frozen, args=image, export_path=str(path), **_tracing())
        cleaned = cleanup.cleanup_model(wrapper.ModelWrapper(str(path)))
    cleaned.model.ir_version = min(cleaned.model.ir_version, _IR_VERSION)
    cleaned.save(str(path))


def _write_qcdq(frozen: nn.Module, image: Tensor, path: Path) -> None:
    """Standard ONNX: QuantizeLinear, Clip and DequantizeLinear."""
    onnx = library("onnx")
    with _exporting():
        library("brevitas.export").export_onnx_qcdq(frozen, args=image, export_path=str(path), **_tracing())
    written = onnx.load(str(path))
    written.ir_version = min(written.ir_version, _IR_VERSION)
    onnx.save(written, str(path))


def _tracing() -> dict[str, Any]:
    # The TorchScript exporter writes one file, in the form in which FPGA compilers know pools and Flatten.
    return {"dynamo": False, "opset_version": _OPSET, "keep_initializers_as_inputs": False, "input_names": ["images"]}


@contextmanager
def _exporting() -> Generator[None]:
    """PyTorch warns of the TorchScript exporter, and of every shape that is fixed by tracing, as is meant."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def _load_onnxruntime(path: Path) -> Classifier:
    runtime = library("onnxruntime")
    options = runtime.SessionOptions()
    # Fused kernels accumulate in another order; here the file itself is on trial.
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return _one_by_one(lambda image: session.run(None, {name: image})[0])


def _load_qonnx(path: Path) -> Classifier:
    """qonnx makes a session of each node for each call, so it is given as many images at once as the graph takes."""
    wrapper, executor = library("qonnx.core.modelwrapper"), library("qonnx.core.onnx_exec")
    infer_shapes = library("qonnx.transformation.infer_shapes")
    model = wrapper.ModelWrapper(str(path))
    given, wanted = model.graph.input[0].name, model.graph.output[0].name

    def run(model: Any, images: Any) -> Any:
        return executor.execute_onnx(model, {given: images})[wanted]

    one_by_one = _one_by_one(lambda image: run(model, image))

    def classify(images: Tensor) -> Tensor:
        many = wrapper.ModelWrapper(str(path))
        # The shapes between input and output are those for one image: found anew.
        del many.graph.value_info[:]
        many.set_tensor_shape(given, list(images.shape))
        many.set_tensor_shape(wanted, [len(images), *many.get_tensor_shape(wanted)[1:]])
        try:
            logits = torch.from_numpy(run(many.transform(infer_shapes.InferShapes()), images.cpu().numpy()))
        except Exception:  # whatever a graph that was traced for one image stumbles over
            return one_by_one(images)
        return logits if len(logits) == len(images) else one_by_one(images)

    return classify


def _one_by_one(run: Callable[[Any], Any]) -> Classifier:
    """A file that was traced on one image takes one image at a time."""

    def classify(images: Tensor) -> Tensor:
        arrays = (image.numpy() for image in images.cpu().split(1))
        return torch.cat([torch.from_numpy(run(array)) for array in arrays])

    return classify


FORMATS = {
    form.name: form
    for form in (
        Format("qonnx", "arbitrary bit-widths, for FPGA compilers", 32, _write_qonnx, _load_qonnx),
        Format("qcdq", "standard ONNX for onnxruntime, up to 8 bit", 8, _write_qcdq, _load_onnxruntime),
    )
}
