"""Weights of few bits take few bits in the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from qadtr_brevitas.exporting import find_format
from qadtr_brevitas.exporting.narrow import narrow_weights
from qadtr_brevitas.pipeline.directories import ONNX_FILE
from qadtr_brevitas.quant import freeze
from tests.exporting.networks import images_of, loaded, plain


def one_layer(weights: np.ndarray) -> onnx.ModelProto:
    """A convolution of int8 weights, as QCDQ writes them."""
    channels = len(weights)
    constants = {"w": weights, "s": np.linspace(0.1, 0.2, channels, dtype=np.float32), "z": np.zeros(channels, np.int8)}
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["w", "s", "z"], ["v"], axis=0),
            helper.make_node("Conv", ["x", "v"], ["y"]),
        ],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, channels, 6, 6])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def output(model: onnx.ModelProto) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, {"x": np.linspace(0, 1, 192, dtype=np.float32).reshape(1, 3, 8, 8)})[0]


@pytest.mark.parametrize(("low", "high", "is_narrow"), [(-8, 7, True), (-1, 1, True), (-8, 8, False), (-9, 7, False)])
def test_what_fits_into_4_bit_is_stored_in_4_bit(low: int, high: int, is_narrow: bool) -> None:
    weights = np.random.default_rng(0).integers(low, high + 1, (5, 3, 3, 3)).astype(np.int8)
    weights.flat[:2] = low, high
    model = one_layer(weights)
    found = narrow_weights(model)
    kinds = {tensor.data_type for tensor in found.graph.initializer}
    assert (TensorProto.INT4 in kinds, TensorProto.INT8 in kinds) == (is_narrow, not is_narrow)
    assert np.array_equal(output(found), output(model))
    if is_narrow:
        (stored,) = [t for t in found.graph.initializer if t.data_type == TensorProto.INT4 and len(t.dims) == 4]
        # 135 weights, two to a byte.
        assert len(stored.raw_data) == 68


@pytest.mark.slow
def test_files_shrink_with_the_bits(tmp_path: Path) -> None:
    model, images, sizes = loaded(plain(), precisions=(8, 4, 2)).model, images_of((16, 16)), {}
    for bits in (8, 4, 2):
        file = tmp_path / f"{bits}-{ONNX_FILE}"
        frozen = freeze(model, bits)
        find_format("qcdq").write(frozen, images[:1], file)
        stored = onnx.load(str(file)).graph.initializer
        sizes[bits] = sum(
            np.prod(t.dims) * (4 if t.data_type == TensorProto.INT4 else 8) // 8
            for t in stored
            if t.data_type in (TensorProto.INT4, TensorProto.INT8) and len(t.dims) > 1
        )
        with torch.no_grad():
            expected = frozen(images)
        found = find_format("qcdq").load(file)(images)
        assert (found - expected).abs().amax(1).median() < 1e-3 * expected.abs().max()
    # First and last layer keep 8 bit.
    assert sizes[2] == sizes[4] < 0.8 * sizes[8]
