"""Graphs of quantizers: in the form of qonnx's own cleanup, and as standard operators for onnxruntime."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qadtr_brevitas.exporting import find_format
from qadtr_brevitas.exporting.clean import cleaned
from qadtr_brevitas.exporting.deployed.quant_nodes import load_standard
from qadtr_brevitas.quant import calibrate, convert, freeze
from tests.exporting.networks import images_of, loaded, plain

pytest.importorskip("qonnx")
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx
from qonnx.util.cleanup import cleanup_model

DOMAIN = "qonnx.custom_op.general"


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of constants and tensors."""
    shapes = {one.name: tuple(numpy_helper.to_array(one).shape) for one in model.graph.initializer}
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        shapes[value.name] = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
    return shapes


def nodes_of(model: Any) -> Counter[str]:
    """Return the nodes with their attributes and the shapes of what they read and write, whatever their names are."""
    shapes = shapes_of(model)
    return Counter(
        f"{node.op_type} {sorted(map(str, node.attribute))} {[shapes[name] for name in (*node.input, *node.output)]}"
        for node in model.graph.node
    )


def run(session_model: Any, images: Any) -> Any:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(session_model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def test_no_two_layers_share_a_zero_point(tmp_path: Path) -> None:
    """Two layers of as many channels would; onnxruntime does not load such a file on processors without VNNI."""
    file, net = tmp_path / "model.onnx", convert(plain().eval(), precisions=[32, 8])
    calibrate(net, [images_of((16, 16))])
    find_format("qcdq").write(freeze(net, 8), images_of((16, 16))[:1], file)
    points = [node.input[2] for node in onnx.load(str(file)).graph.node if node.op_type == "DequantizeLinear"]
    assert len(points) == len(set(points)) > 4
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


@pytest.mark.slow
def test_the_cleanup_of_qonnx_finds_nothing_to_do(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    net: Any = loaded(plain()).model
    images = images_of((16, 16))
    find_format("qonnx").write(freeze(net, 4), images[:1], file)
    model: Any = onnx.load(str(file))
    again = cleanup_model(ModelWrapper(str(file)))
    # It numbers the nodes in another order.
    assert nodes_of(again.model) == nodes_of(model)
    assert len(again.graph.initializer) == len(model.graph.initializer)
    shapes = shapes_of(model)
    # Every tensor has a shape, all of whose sizes are known.
    written = {name for node in model.graph.node for name in node.output}
    assert written <= shapes.keys()
    assert all(0 not in shape for shape in shapes.values())
    assert max(Counter(name for node in model.graph.node for name in node.input if "_param" in name).values()) == 1

    found = run(load_standard(file), images[:1].numpy())
    by_qonnx = execute_onnx(ModelWrapper(str(file)), {"images": images[:1].numpy()})["logits"]
    assert np.allclose(found, by_qonnx, atol=1e-5 * np.abs(by_qonnx).max())


def quantizer(source: str, *, signed: int, narrow: int, rounding: str, bits: float, zero: float, fixed: bool) -> Any:
    values = {"step": np.array([[0.25], [0.5]], np.float32), "zero": np.float32(zero), "bits": np.float32(bits)}
    node = helper.make_node(
        "Quant",
        [source, *values],
        ["y"],
        name="Quant_0",
        domain=DOMAIN,
        signed=signed,
        narrow=narrow,
        rounding_mode=rounding,
    )
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    grid = numpy_helper.from_array(GRID, "w")
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, GRID.shape)]
    wanted = [helper.make_tensor_value_info("z", TensorProto.FLOAT, GRID.shape)]
    nodes = [node, helper.make_node("Add", ["x", "y"] if fixed else ["y", "w"], ["z"], name="Add_0")]
    shape = [helper.make_tensor_value_info("y", TensorProto.FLOAT, GRID.shape)]
    graph = helper.make_graph(nodes, "graph", given, wanted, [*constants, grid], value_info=shape)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


GRID = np.arange(-12, 12, dtype=np.float32).reshape(2, 12) * 0.125


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(("signed", "narrow"), [(1, 0), (1, 1), (0, 0), (0, 1)])
@pytest.mark.parametrize(("rounding", "bits", "zero"), [("ROUND", 2, 0), ("FLOOR", 3, 1), ("CEIL", 8, 0)])
def test_a_quantizer_is_that_of_qonnx(
    signed: int, narrow: int, rounding: str, bits: float, zero: float, fixed: bool, tmp_path: Path
) -> None:
    model = quantizer(
        "w" if fixed else "x", signed=signed, narrow=narrow, rounding=rounding, bits=bits, zero=zero, fixed=fixed
    )
    onnx.save(model, str(tmp_path / "model.onnx"))
    expected = execute_onnx(ModelWrapper(model), {"x": GRID})["z"]
    assert np.array_equal(run(load_standard(tmp_path / "model.onnx"), GRID), expected)


def test_a_quantizer_whose_range_is_computed_is_refused(tmp_path: Path) -> None:
    model = quantizer("x", signed=1, narrow=0, rounding="ROUND", bits=4, zero=0, fixed=False)
    model.graph.node[0].input[1] = "x"
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(ValueError, match=r"Quant_0.*qonnx"):
        load_standard(tmp_path / "model.onnx")


def test_what_is_shared_turned_or_known_from_the_start(tmp_path: Path) -> None:
    """A constant of two nodes, weights that a Transpose turns for each image, and a size that is computed."""
    graph = helper.make_graph(
        [
            helper.make_node("Quant", ["w", "s", "o", "b"], ["q"], domain=DOMAIN, signed=1, narrow=0),
            helper.make_node("Transpose", ["q"], ["t"], perm=[1, 0]),
            helper.make_node("Shape", ["x"], ["size"]),
            helper.make_node("Reshape", ["x", "size"], ["same"]),
            helper.make_node("Add", ["c", "same"], ["a"]),
            helper.make_node("MatMul", ["a", "t"], ["m"]),
            helper.make_node("Mul", ["m", "c"], ["y"]),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
        [
            numpy_helper.from_array(np.array([[1, 2], [3, 4]], np.float32), "w"),
            numpy_helper.from_array(np.array([[1], [0.5]], np.float32), "s"),
            *(
                numpy_helper.from_array(np.array(value, np.float32), name)
                for name, value in (("o", 0), ("b", 8), ("c", 3))
            ),
        ],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    model = cleaned(helper.make_model(graph, opset_imports=imports, ir_version=8), input_name="in", output_name="out")
    assert [node.op_type for node in model.graph.node] == ["Quant", "Reshape", "Add", "MatMul", "Mul"]
    values = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    assert values["Quant_0_param0"].tolist() == [[1, 3], [2, 4]]
    assert values["Quant_0_param1"].tolist() == [[1, 0.5]]
    assert list(model.graph.node[2].input) == ["Reshape_0_out0", "Add_0_param0"]
    assert (values["Add_0_param0"], values["Mul_0_param0"]) == (3, 3)
    onnx.save(model, str(tmp_path / "model.onnx"))
    x = np.array([[1, 2]], np.float32)
    found = run(load_standard(tmp_path / "model.onnx"), x)
    assert np.array_equal(found, 3 * ((x + 3) @ np.array([[1, 3], [2, 4]], np.float32)))
