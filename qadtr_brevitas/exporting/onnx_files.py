"""How ONNX files are written and executed, and the formats that are a file alone: qonnx, qcdq and ort."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from qadtr_brevitas.core.errors import ExportError
from qadtr_brevitas.exporting.compiler import Compiler
from qadtr_brevitas.exporting.constants import fold_constants
from qadtr_brevitas.exporting.formats import Classifier, Format
from qadtr_brevitas.exporting.fuse import fuse
from qadtr_brevitas.exporting.graph import library
from qadtr_brevitas.exporting.integers import integer_layers
from qadtr_brevitas.exporting.rewrite import rewrite
from qadtr_brevitas.exporting.rules import problems
from qadtr_brevitas.exporting.shortcuts import replace_shortcuts

# The newest IR that the onnxruntime of the same time reads, whichever onnx wrote the file.
_IR_VERSION = 10
# Reduces to the operators that every compiler here knows.
_OPSET = 17


def _write_qonnx(frozen: nn.Module, image: Tensor, path: Path) -> None:
    """QONNX as Brevitas exports it, with the graph cleaned by qonnx."""
    with _exporting():
        _save(_cleaned(_export_qonnx(frozen, image, path)), path)


def writer_for(compiler: Compiler) -> Callable[[nn.Module, Tensor, Path], None]:
    """Return a function that writes QONNX in the operators that a compiler knows.

    The function raises an ExportError where the compiler would refuse the network, or compute something else.
    """

    def write(frozen: nn.Module, image: Tensor, path: Path) -> None:
        fold, infer = library("qonnx.transformation.fold_constants"), library("qonnx.transformation.infer_shapes")
        frozen = copy.deepcopy(frozen)
        replace_shortcuts(frozen, image)
        with _exporting():
            # As cleanup does, but for the names, which say what layer a node is from.
            model = _export_qonnx(frozen, image, path).transform(infer.InferShapes())
            model = model.transform(fold.FoldConstants(exclude_op_types=["Quant"]))
            if found := problems(model, power_of_two=compiler.power_of_two):
                raise ExportError(
                    f"{compiler.name} cannot take this network. {'. '.join(found)}. Sums and steps come right with "
                    f"`qadtr-brevitas convert MODEL --target {compiler.name}`, or training with "
                    f"quant.target={compiler.name}"
                )
            rewrite(model, compiler.adapt_input)
            _save(_cleaned(model), path)

    return write


def _export_qonnx(frozen: nn.Module, image: Tensor, path: Path) -> Any:
    library("brevitas.export").export_qonnx(frozen, args=image, export_path=str(path), **_tracing())
    return library("qonnx.core.modelwrapper").ModelWrapper(str(path))


def _cleaned(model: Any) -> Any:
    """Return a qonnx graph without constant parts, with readable names."""
    infer, wrapper = library("qonnx.transformation.infer_shapes"), library("qonnx.core.modelwrapper").ModelWrapper
    # qonnx starts anew after every node that it folds, and sorts the graph after every step: minutes for a transformer.
    model = model.transform(infer.InferShapes(), cleanup=False)
    model.model = fold_constants(model.model)
    # Sizes that depended on what is folded are inferred anew.
    del model.graph.value_info[:]
    model = model.cleanup()
    rename = wrapper.rename_tensor

    def rename_everywhere(self: Any, old: str, new: str) -> None:
        rename(self, old, new)
        # qonnx renames the first of the inputs of a node that reads one tensor twice, as x * x does.
        for node in self.graph.node:
            for index, name in enumerate(node.input):
                if name == old:
                    node.input[index] = new

    unsorted = patch.object(wrapper, "cleanup", lambda self: self)
    with patch.object(wrapper, "rename_tensor", rename_everywhere), unsorted:
        return library("qonnx.util.cleanup").cleanup_model(model)


def _save(model: Any, path: Path) -> None:
    model.model.ir_version = min(model.model.ir_version, _IR_VERSION)
    model.save(str(path))


def _write_qcdq(frozen: nn.Module, image: Tensor, path: Path) -> None:
    """Write standard ONNX: QuantizeLinear, Clip and DequantizeLinear."""
    onnx = library("onnx")
    with _exporting():
        library("brevitas.export").export_onnx_qcdq(frozen, args=image, export_path=str(path), **_tracing())
    written = fold_constants(onnx.load(str(path)), keep=("DequantizeLinear",))
    written.ir_version = min(written.ir_version, _IR_VERSION)
    onnx.save(written, str(path))


def _write_fused(frozen: nn.Module, image: Tensor, path: Path) -> None:
    """Write standard ONNX as onnxruntime computes it in integers."""
    frozen = copy.deepcopy(frozen)
    replace_shortcuts(frozen, image)
    _write_qcdq(frozen, image, path)
    model = library("qonnx.core.modelwrapper").ModelWrapper(str(path))
    fuse(model)
    _save(model, path)


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


def load_qonnx(path: Path) -> Classifier:
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
    """Return a classifier that gives a file one image at a time, as it was traced."""

    def classify(images: Tensor) -> Tensor:
        arrays = (image.numpy() for image in images.cpu().split(1))
        return torch.cat([torch.from_numpy(run(array)) for array in arrays])

    return classify


QONNX = Format(
    name="qonnx",
    help="arbitrary bit-widths, as Brevitas writes them",
    max_bits=32,
    write=_write_qonnx,
    load=load_qonnx,
)
QCDQ = Format(
    name="qcdq",
    help="standard ONNX for onnxruntime, up to 8 bit",
    max_bits=8,
    write=_write_qcdq,
    load=_load_onnxruntime,
)
ORT = Format(
    name="ort",
    help="standard ONNX that onnxruntime fuses, fast, for 8 bit on CPUs",
    max_bits=8,
    target="ort",
    write=_write_fused,
    load=_load_fused,
    count_integers=integer_layers,
    remedy="ort rounds biases to integers, which tells the more the fewer the bits: -f qcdq computes the same.",
)
