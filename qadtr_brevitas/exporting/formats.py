"""The formats a frozen model is written in, and what executes them.

What keeps a network from being written in a format.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qadtr_brevitas.core.errors import ExportError, UsageError
from qadtr_brevitas.core.precision import FLOAT_BITS, Precision
from qadtr_brevitas.exporting.fuse import fuse
from qadtr_brevitas.exporting.graph import library
from qadtr_brevitas.exporting.rewrite import PIXELS, Compiler, rewrite
from qadtr_brevitas.exporting.rules import problems
from qadtr_brevitas.exporting.shortcuts import replace_shortcuts
from qadtr_brevitas.quant.quantizers import SwitchableDynamicQuant, SwitchableQuant

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
        takes_bytes: it takes pixels as bytes, so images are rounded to these before anything is compared.
        compiler: the FPGA compiler that it is for; what this needs besides is written beside the file.
        remedy: what to do where a file computes something else, a sentence.
    """

    name: str
    help: str
    max_bits: int
    write: Callable[[nn.Module, Tensor, Path], None]
    load: Callable[[Path], Classifier]
    takes_bytes: bool = False
    compiler: Compiler | None = None
    remedy: str = ""


def _write_qonnx(frozen: nn.Module, image: Tensor, path: Path) -> None:
    """QONNX as Brevitas exports it, with the graph cleaned by qonnx."""
    with _exporting():
        model = _export_qonnx(frozen, image, path)
        _save(library("qonnx.util.cleanup").cleanup_model(model), path)


def _write_finn(frozen: nn.Module, image: Tensor, path: Path) -> None:
    _write_for_fpga(frozen, image, path, "finn")


def _write_hls4ml(frozen: nn.Module, image: Tensor, path: Path) -> None:
    _write_for_fpga(frozen, image, path, "hls4ml")


def _write_for_fpga(frozen: nn.Module, image: Tensor, path: Path, compiler: Compiler) -> None:
    """QONNX in the words that a compiler knows.

    Raises:
        ExportError: it would refuse the network, or compute something else.
    """
    fold, infer = library("qonnx.transformation.fold_constants"), library("qonnx.transformation.infer_shapes")
    frozen = copy.deepcopy(frozen)
    replace_shortcuts(frozen, image)
    with _exporting():
        # As cleanup does, but for the names, which say what layer a node is from.
        model = _export_qonnx(frozen, image, path).transform(infer.InferShapes())
        model = model.transform(fold.FoldConstants(exclude_op_types=["Quant"]))
        if found := problems(model, power_of_two=compiler == "hls4ml"):
            raise ExportError(
                f"{compiler} cannot take this network. {'. '.join(found)}. Sums and steps come right with "
                f"`qadtr-brevitas convert MODEL --target {compiler}`, or training with quant.target={compiler}"
            )
        rewrite(model, compiler=compiler)
        _save(library("qonnx.util.cleanup").cleanup_model(model), path)


def _export_qonnx(frozen: nn.Module, image: Tensor, path: Path) -> Any:
    library("brevitas.export").export_qonnx(frozen, args=image, export_path=str(path), **_tracing())
    return library("qonnx.core.modelwrapper").ModelWrapper(str(path))


def _save(model: Any, path: Path) -> None:
    model.model.ir_version = min(model.model.ir_version, _IR_VERSION)
    model.save(str(path))


def _write_qcdq(frozen: nn.Module, image: Tensor, path: Path) -> None:
    """Standard ONNX: QuantizeLinear, Clip and DequantizeLinear."""
    onnx = library("onnx")
    with _exporting():
        library("brevitas.export").export_onnx_qcdq(frozen, args=image, export_path=str(path), **_tracing())
    written = onnx.load(str(path))
    written.ir_version = min(written.ir_version, _IR_VERSION)
    onnx.save(written, str(path))


def _write_fused(frozen: nn.Module, image: Tensor, path: Path) -> None:
    """The same, as onnxruntime computes it in integers."""
    _write_qcdq(frozen, image, path)
    model = library("qonnx.core.modelwrapper").ModelWrapper(str(path))
    fuse(model)
    _save(model.transform(library("qonnx.transformation.general").RemoveUnusedTensors()), path)


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
    # Fused kernels accumulate in another order; here the file itself is on trial.
    return _load_session(path, "ORT_DISABLE_ALL")


def _load_fused(path: Path) -> Classifier:
    # As it will run: what onnxruntime makes of it is on trial too.
    return _load_session(path, "ORT_ENABLE_ALL")


def _load_session(path: Path, level: str) -> Classifier:
    runtime = library("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = getattr(runtime.GraphOptimizationLevel, level)
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


def _load_finn(path: Path) -> Classifier:
    """The file takes bytes, which arithmetic in floats holds exactly."""
    classify = _load_qonnx(path)
    return lambda images: classify((images * PIXELS).round())


def _one_by_one(run: Callable[[Any], Any]) -> Classifier:
    """A file that was traced on one image takes one image at a time."""

    def classify(images: Tensor) -> Tensor:
        arrays = (image.numpy() for image in images.cpu().split(1))
        return torch.cat([torch.from_numpy(run(array)) for array in arrays])

    return classify


FORMATS = {
    form.name: form
    for form in (
        Format("qonnx", "arbitrary bit-widths, as Brevitas writes them", 32, _write_qonnx, _load_qonnx),
        Format("qcdq", "standard ONNX for onnxruntime, up to 8 bit", 8, _write_qcdq, _load_onnxruntime),
        Format(
            "ort",
            "standard ONNX that onnxruntime fuses, fast, for 8 bit on CPUs",
            8,
            _write_fused,
            _load_fused,
            remedy="ort rounds biases to integers, which tells the more the fewer the bits: -f qcdq computes the same.",
        ),
        Format("finn", "a folder to build with FINN", 8, _write_finn, _load_finn, takes_bytes=True, compiler="finn"),
        Format("hls4ml", "a folder to build with hls4ml", 8, _write_hls4ml, _load_qonnx, compiler="hls4ml"),
    )
}


def check_bits(precision: Precision, form: Format) -> None:
    """Refuses a precision with floats.

    Raises:
        UsageError: weights or activations are not quantized.
    """
    if FLOAT_BITS in (precision.weight, precision.act):
        raise UsageError(f"{form.name} holds integers, and at {precision} there are floats: choose fewer bits")


def blockers(model: nn.Module, form: Format) -> list[str]:
    """What is in the way, in words; nothing where the format can hold the network.

    Args:
        model: a switchable model, at the precision to export.
        form: the format.
    """
    return [*_too_many_bits(model, form), *_dynamic(model, form)]


def _too_many_bits(model: nn.Module, form: Format) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(module, SwitchableQuant) and module.bits > form.max_bits:
            yield f"{name} has {module.bits} bits, more than the {form.max_bits} that {form.name} has room for"
            return


def _dynamic(model: nn.Module, form: Format) -> Iterator[str]:
    if any(isinstance(module, SwitchableDynamicQuant) for module in model.modules()):
        yield (
            f"its activations take their ranges from each image, which {form.name} has no word for: convert it again "
            "without --dynamic"
        )
