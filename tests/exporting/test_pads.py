"""Borders of zeros become the padding of convolutions, and nothing else does: executed before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qadtr_brevitas.exporting import find_format
from qadtr_brevitas.pipeline.directories import ONNX_FILE
from qadtr_brevitas.quant import freeze
from tests.exporting.networks import Ported, images_of, loaded

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pads = pytest.importorskip("qadtr_brevitas.exporting.pads")

UNEVEN = (0, 0, 1, 0, 0, 0, 2, 1)
# Constants that nodes name.
CONSTANTS: dict[str, Any] = {
    "weight": np.random.default_rng(0).normal(size=(2, 3, 3, 3)).astype(np.float32),
    **{"step": np.float32(0.25), "zero": np.uint8(7), "signed_zero": np.int8(-3), "bytes_zero": np.uint8(200)},
    **{"0": np.float32(0), "1": np.float32(1), "6": np.float32(6), "half": np.float32(3.5), "-9": np.float32(-9)},
    **{"4 bits": np.float32(4), "low": np.uint8(0), "high": np.uint8(15)},
}


def graph(sizes: tuple[int, ...], *nodes: Any, value: str = "", mode: str = "constant", **more: Any) -> Any:
    """Return a model of a Pad of `image` to `padded` and other nodes, the last of which gives the output."""
    helper = onnx.helper
    constants = CONSTANTS | {"sizes": np.array(sizes, np.int64)} | more
    pad = helper.make_node("Pad", ["image", "sizes", value], ["padded"], mode=mode)
    info = helper.make_tensor_value_info
    image = info("image", onnx.TensorProto.FLOAT, [1, 3, 6, 7])
    output = info(nodes[-1].output[0], onnx.TensorProto.FLOAT, None)
    tensors = [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    made = helper.make_graph([pad, *nodes], "padded", [image], [output], tensors)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def node(kind: str, inputs: str, output: str, **attributes: Any) -> Any:
    return onnx.helper.make_node(kind, inputs.split(","), [output], **attributes)


def conv(given: str = "padded", output: str = "y", **attributes: Any) -> Any:
    return node("Conv", f"{given},weight", output, kernel_shape=[3, 3], **attributes)


def run(model: Any) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    image = np.random.default_rng(1).normal(size=(1, 3, 6, 7)).astype(np.float32)
    return session.run(None, {"image": image})[0]


def kinds(model: Any) -> list[str]:
    return [found.op_type for found in model.graph.node]


def quantized(zero: str) -> list[Any]:
    return [
        node("QuantizeLinear", f"padded,step,{zero}", "levels"),
        node("DequantizeLinear", f"levels,step,{zero}", "values"),
    ]


MERGED = {
    "uneven": [conv()],
    "on top of its own": [conv(pads=[1, 2, 0, 1], strides=[2, 2])],
    "on top of same": [conv(auto_pad="SAME_UPPER")],
    "valid": [conv(auto_pad="VALID", dilations=[2, 1])],
    "two readers": [conv(output="a", strides=[2, 2]), conv(output="b", pads=[0, 0, 0, 0], strides=[2, 2]), None],
    "behind a ReLU6": [node("Relu", "padded", "r"), node("Clip", "r,0,6", "c"), conv("c")],
    "behind levels around 7": [*quantized("zero"), conv("values")],
    "behind negative levels": [*quantized("signed_zero"), conv("values")],
    "twice": [node("Pad", "padded,sizes", "again"), conv("again")],
}
MERGED["two readers"][-1] = node("Add", "a,b", "y")


@pytest.mark.parametrize("name", MERGED)
def test_zeros_become_the_convolutions_padding(name: str) -> None:
    model = graph(UNEVEN, *MERGED[name])
    expected = run(model)
    assert "Pad" not in kinds(pads.merge_pads(model))
    assert np.array_equal(run(model), expected)
    onnx.checker.check_model(model, full_check=True)


KEPT: dict[str, Any] = {
    "cut": graph((0, 0, -1, 0, 0, 0, 1, 1), conv()),
    "channels": graph((0, 1, 1, 1, 0, 0, 1, 1), conv(), weight=np.ones((2, 4, 3, 3), np.float32)),
    "ones": graph(UNEVEN, conv(), value="1"),
    "mirrored": graph(UNEVEN, conv(), mode="reflect"),
    "read by a pool too": graph(
        UNEVEN,
        *(conv(output="a"), node("MaxPool", "padded", "p", kernel_shape=[3, 3])),
        *(node("ReduceSum", "p,axes", "b"), node("Add", "a,b", "y")),
        axes=np.array([1]),
    ),
    "lifted": graph(UNEVEN, node("Clip", "padded,1,6", "c"), conv("c")),
    "not bounded below": graph(UNEVEN, node("Clip", "padded,,-9", "c"), conv("c")),
    "normalized": graph(UNEVEN, node("Sub", "padded,1", "s"), conv("s")),
    "other levels": graph(
        UNEVEN,
        node("QuantizeLinear", "padded,step,zero", "q"),
        *(node("Clip", "q,low,low", "c"), node("DequantizeLinear", "c,step,zero", "v"), conv("v")),
    ),
    "weights": graph((0, 0, 0, 0, 0, 0, 0, 0), node("Conv", "image,padded", "y"), weight=np.ones(1, np.float32)),
}


@pytest.mark.parametrize("name", KEPT)
def test_another_border_stays(name: str) -> None:
    model = KEPT[name]
    expected = run(model)
    assert "Pad" in kinds(pads.merge_pads(model))
    assert np.array_equal(run(model), expected)


@pytest.mark.parametrize(
    ("zero", "signed", "is_merged"), [("0", 1, True), ("6", 0, True), ("half", 1, False), ("-9", 1, False)]
)
def test_what_a_quantizer_makes_of_zero_decides(zero: str, signed: int, is_merged: bool) -> None:
    quant = node("Quant", f"padded,step,{zero},4 bits", "q", signed=signed, domain="qonnx.custom_op.general")
    model = graph(UNEVEN, quant, conv("q"))
    model.opset_import.append(onnx.helper.make_opsetid("qonnx.custom_op.general", 1))
    assert ("Pad" not in kinds(pads.merge_pads(model))) == is_merged


@pytest.mark.slow
@pytest.mark.parametrize("form", ["finn", "qcdq"])
def test_networks_from_tensorflow_have_no_pad_in_any_file(form: str, tmp_path: Path) -> None:
    found, images = find_format(form), images_of((16, 16))
    frozen = freeze(loaded(Ported(), target=found.target, precisions=(4,)).model, 4)
    file = tmp_path / ONNX_FILE
    with torch.no_grad():
        expected = frozen(images)
    if found.write_dynamic is None:
        found.write(frozen, images[:1], file)
    else:
        found.write_dynamic(frozen, images, file)
    model = onnx.load(str(file))
    assert not {"Pad", "Shape", "Gather", "Ceil"} & set(kinds(model))
    borders = [list(one.ints) for n in model.graph.node for one in n.attribute if one.name == "pads"]
    assert borders.count([0, 0, 1, 1]) == 2
    logits = found.load(file)(images)
    assert (logits - expected).abs().amax(1).median() < 1e-5
