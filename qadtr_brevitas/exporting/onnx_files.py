"""How ONNX files are written and executed, and the formats that are a file alone: qonnx, qcdq and ort."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qadtr_brevitas.exporting.clean import cleaned, folded, with_own_zero_points
from qadtr_brevitas.exporting.compiler import Compiler
from qadtr_brevitas.exporting.constants import fold_constants
from qadtr_brevitas.exporting.deployed.run import session_options
from qadtr_brevitas.exporting.formats import Classifier, Format
from qadtr_brevitas.exporting.fuse import fuse
from qadtr_brevitas.exporting.graph import library
from qadtr_brevitas.exporting.head_scales import move_steps_outside
from qadtr_brevitas.exporting.integers import integer_layers
from qadtr_brevitas.exporting.narrow import narrow_weights
from qadtr_brevitas.exporting.near_ties import clear_near_ties
from qadtr_brevitas.exporting.pads import merge_pads
from qadtr_brevitas.exporting.rewrite import rewrite
from qadtr_brevitas.exporting.rules import check_network
from qadtr_brevitas.exporting.shortcuts import replace_shortcuts
from qadtr_brevitas.exporting.tracing import KnownPools, exporter_errors
from qadtr_brevitas.pipeline.directories import ONNX_FILE

INPUT, OUTPUT = "images", "logits"
# The newest IR that the onnxruntime of the same time reads, whichever onnx wrote the file.
_IR_VERSION = 10
# Reduces to the operators that every compiler here knows.
_OPSET = 17


def _write_qonnx(frozen: nn.Module, images: Tensor, path: Path) -> None:
    """QONNX as Brevitas exports it, with a graph that tools can read."""
    with exporting():
        model = export_qonnx(frozen, images, path)
        _save_onnx(cleaned(model.model, input_name=INPUT, output_name=OUTPUT), path)


def writer_for(compiler: Compiler) -> Callable[[nn.Module, Tensor, Path], None]:
    """Return a function that writes QONNX in the operators that a compiler knows.

    The function raises an ExportError where the compiler would refuse the network, or compute something else.
    """

    def write(frozen: nn.Module, image: Tensor, path: Path) -> None:
        with exporting():
            model = _traced_for(compiler, frozen, image, path)
            rewrite(model, compiler.adapt)
            clear_near_ties(model)
            # The names that qonnx gives them.
            _save_onnx(cleaned(model.model, input_name="global_in", output_name="global_out"), path)

    return write


def check_traced(compiler: Compiler, frozen: nn.Module, image: Tensor) -> None:
    """Refuse a network that a compiler would refuse, or compute wrongly.

    Args:
        compiler: which one.
        frozen: a frozen model.
        image: what it takes, (1, C, H, W).

    Raises:
        ExportError: what is in the way, with the layers that it concerns.
    """
    with tempfile.TemporaryDirectory() as folder, exporting():
        _traced_for(compiler, frozen, image, Path(folder) / ONNX_FILE)


def _traced_for(compiler: Compiler, frozen: nn.Module, image: Tensor, path: Path) -> Any:
    """Return a QONNX graph that a compiler can take, with the names that PyTorch gave."""
    frozen = copy.deepcopy(frozen)
    replace_shortcuts(frozen, image)
    # With the names that say what layer a node is from.
    model = library("qonnx.core.modelwrapper").ModelWrapper(folded(export_qonnx(frozen, image, path).model))
    check_network(model, compiler)
    return model


def export_qonnx(frozen: nn.Module, image: Tensor, path: Path) -> Any:
    """Return a frozen network as Brevitas writes it, a qonnx ModelWrapper; call it within `exporting`."""
    library("brevitas.export").export_qonnx(frozen, args=image, export_path=str(path), **_tracing())
    return library("qonnx.core.modelwrapper").ModelWrapper(str(path))


def _save(model: Any, path: Path) -> None:
    _save_onnx(model.model, path)


def _save_onnx(model: Any, path: Path) -> None:
    model.ir_version = min(model.ir_version, _IR_VERSION)
    library("onnx").save(model, str(path))


def _write_qcdq(frozen: nn.Module, images: Tensor, path: Path, *, dynamic: bool = False) -> None:
    """Write standard ONNX: QuantizeLinear, Clip and DequantizeLinear, with weights of up to 4 bit as int4."""
    _save_onnx(narrow_weights(_qcdq(frozen, images, path, dynamic=dynamic)), path)


def _write_fused(frozen: nn.Module, images: Tensor, path: Path, *, dynamic: bool = False) -> None:
    """Write standard ONNX as onnxruntime computes it in integers."""
    frozen = copy.deepcopy(frozen)
    replace_shortcuts(frozen, images[:1])
    model = library("qonnx.core.modelwrapper").ModelWrapper(_qcdq(frozen, images, path, dynamic=dynamic))
    fuse(model)
    _save(model, path)


def _qcdq(frozen: nn.Module, images: Tensor, path: Path, *, dynamic: bool) -> Any:
    with exporting():
        tracing = _tracing(dynamic=dynamic)
        library("brevitas.export").export_onnx_qcdq(frozen, args=images, export_path=str(path), **tracing)
    model = fold_constants(library("onnx").load(str(path)), keep=("DequantizeLinear",))
    return with_own_zero_points(move_steps_outside(merge_pads(model)))


def write_float(network: nn.Module, images: Tensor, path: Path, *, dynamic: bool = False) -> None:
    """Write a float network as standard ONNX.

    Args:
        network: images (N, C, H, W) in [0, 1] to logits.
        images: of which the file takes so many at once.
        path: the file.
        dynamic: whether it takes any number of images.
    """
    with exporting():
        torch.onnx.export(network, (images,), str(path), **_tracing(dynamic=dynamic))
    _save_onnx(merge_pads(fold_constants(library("onnx").load(str(path)))), path)


def _tracing(*, dynamic: bool = False) -> dict[str, Any]:
    # The TorchScript exporter writes one file, in the form in which FPGA compilers know pools and Flatten.
    return {
        "dynamo": False,
        "opset_version": _OPSET,
        "keep_initializers_as_inputs": False,
        "input_names": [INPUT],
        "output_names": [OUTPUT],
        "dynamic_axes": {INPUT: {0: "batch"}, OUTPUT: {0: "batch"}} if dynamic else None,
    }


@contextmanager
def exporting() -> Generator[None]:
    """Trace without warnings, and with pools that the exporter knows.

    PyTorch warns of the TorchScript exporter, and of every shape that is fixed by tracing, as is meant.
    """
    with warnings.catch_warnings(), torch.no_grad(), KnownPools(), exporter_errors():
        warnings.simplefilter("ignore")
        yield


def load_onnxruntime(path: Path) -> Classifier:
    """Return what a file computes, without the optimizations of onnxruntime."""
    # Fused kernels accumulate in another order; here the file itself is on trial.
    return _load_session(path, "ORT_DISABLE_ALL")


def _load_fused(path: Path) -> Classifier:
    # As it will run: what onnxruntime makes of it is on trial too.
    return _load_session(path, "ORT_ENABLE_ALL")


def _load_session(path: Path, level: str) -> Classifier:
    return _session_of(str(path), level)


def _session_of(model: str | bytes, level: str) -> Classifier:
    """Return what a model computes that is a path or the bytes of a file."""
    runtime = library("onnxruntime")
    options = session_options()
    options.graph_optimization_level = getattr(runtime.GraphOptimizationLevel, level)
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0]
    return _in_batches(lambda images: session.run(None, {given.name: images})[0], given.shape[0])


def load_qonnx(path: Path) -> Classifier:
    """Return what a file of quantizers computes: of the first image in qonnx itself, of others in onnxruntime.

    qonnx makes a session of each node for each call. onnxruntime is given the operators that quantizers stand for.
    """
    # It imports onnx, which is optional.
    from qadtr_brevitas.exporting.deployed.quant_nodes import load_standard

    wrapper, executor = library("qonnx.core.modelwrapper"), library("qonnx.core.onnx_exec")
    fast = _session_of(load_standard(path).SerializeToString(), "ORT_DISABLE_ALL")
    model: Any = wrapper.ModelWrapper(str(path))
    given, wanted = model.graph.input[0].name, model.graph.output[0].name
    slow = _in_batches(
        lambda images: executor.execute_onnx(model, {given: images})[wanted], model.get_tensor_shape(given)[0]
    )
    tried = False

    def classify(images: Tensor) -> Tensor:
        nonlocal tried
        if tried:
            return fast(images)
        tried = True
        return torch.cat([slow(images[:1]), *([fast(images[1:])] if len(images) > 1 else [])])

    return classify


def _in_batches(run: Callable[[Any], Any], size: int | str) -> Classifier:
    """Return a classifier that gives a file as many images at a time as it takes.

    Args:
        run: computes logits (n, classes) of images (n, C, H, W), arrays.
        size: how many images it takes at once; a name where it takes any number.
    """

    def classify(images: Tensor) -> Tensor:
        if isinstance(size, str):
            # One alone and the others together: a file that mixes images gives them other logits.
            parts = images.cpu().tensor_split([1])
            return torch.cat([torch.from_numpy(run(part.numpy())) for part in parts if len(part)])
        batches = images.cpu().split(size)
        # The last batch is filled up.
        full = (torch.cat([batch, batch[-1:].expand(size - len(batch), -1, -1, -1)]) for batch in batches)
        return torch.cat([torch.from_numpy(run(batch.numpy())) for batch in full])[: len(images)]

    return classify


QONNX = Format(
    name="qonnx",
    help="arbitrary bit-widths, as Brevitas writes them",
    max_bits=32,
    write=_write_qonnx,
    load=load_qonnx,
    runtimes="qonnx and tools that read QONNX (FINN, hls4ml, netron). onnxruntime does not know its Quant nodes; "
    "`run.py` gives it the standard operators that they stand for",
)
QCDQ = Format(
    name="qcdq",
    help="standard ONNX for onnxruntime, up to 8 bit",
    max_bits=8,
    write=_write_qcdq,
    write_dynamic=partial(_write_qcdq, dynamic=True),
    load=load_onnxruntime,
    runtimes="onnxruntime with any execution provider, and OpenVINO",
)
ORT = Format(
    name="ort",
    help="standard ONNX that onnxruntime fuses, fast, for 8 bit on CPUs",
    max_bits=8,
    target="ort",
    write=_write_fused,
    write_dynamic=partial(_write_fused, dynamic=True),
    load=_load_fused,
    exact=False,
    count_integers=integer_layers,
    runtimes="onnxruntime on CPUs, for which it is made; OpenVINO loads it too",
    caution="On x86 processors without VNNI (Intel before 2019, AMD before 2022) set onnxruntime's session option "
    "session.x64quantprecision to 1, as run.py does, or products of weights of 8 bit saturate.",
    remedy="ort rounds biases to integers, which tells the more the fewer the bits: -f qcdq computes the same.",
)
