"""The form that onnxruntime runs in integers: nothing between it and the network but rounding."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.exporting import find_format
from qadtr_brevitas.pipeline.directories import ONNX_FILE
from qadtr_brevitas.quant import freeze
from tests.exporting.networks import Mobile, images_of, loaded, plain, residual, stem

IMAGES = images_of((16, 16))


def write(given: LoadedModel, bits: int, folder: Path) -> nn.Module:
    frozen = freeze(given.model, bits)
    find_format("ort").write(frozen, IMAGES[:1], folder / ONNX_FILE)
    return frozen


def optimized(folder: Path) -> Counter[str]:
    """What onnxruntime makes of the file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(str(folder / ONNX_FILE), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(str(folder / "optimized.onnx")).graph.node)


@pytest.mark.slow
@pytest.mark.parametrize(("net", "integer_layers"), [(plain, 3), (residual, 6), (Mobile, 8)])
def test_at_8_bit_every_convolution_runs_in_integers(net: object, integer_layers: int, tmp_path: Path) -> None:
    frozen = write(loaded(net(), target="finn", precisions=(8,)), 8, tmp_path)
    with torch.no_grad():
        expected = frozen(IMAGES)
    found = find_format("ort").load(tmp_path / ONNX_FILE)(IMAGES)
    assert (found - expected).abs().amax(1).median() < 0.01 * expected.abs().max()
    kinds = optimized(tmp_path)
    assert kinds["QLinearConv"] == integer_layers
    assert not {"BatchNormalization", "Conv"} & set(kinds)
    # A byte a weight: the former weights are gone, and nothing is stored that is not read.
    graph = onnx.load(str(tmp_path / ONNX_FILE)).graph
    assert {tensor.name for tensor in graph.initializer} <= {name for node in graph.node for name in node.input}
    stored = sum(math.prod(t.dims) for t in graph.initializer if t.data_type == onnx.TensorProto.INT8 and t.dims[1:])
    assert stored == sum(module.weight.numel() for module in frozen.modules() if hasattr(module, "weight_quant"))


@pytest.mark.slow
def test_a_norm_that_turns_signs_around_is_merged_where_levels_are_symmetric(tmp_path: Path) -> None:
    net = nn.Sequential(*stem(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    for narrow in (True, False):
        given = loaded(net, precisions=(8,), narrow_range=narrow)
        with torch.no_grad():
            given.model.net[1].weight[:3] = torch.tensor([-1.0, 0.0, -0.5])
            # The lowest level is used.
            given.model.net[0].weight[0, 0, 0, 0] = -10.0
            frozen = write(given, 8, tmp_path)
            expected = frozen(IMAGES)
        found = find_format("ort").load(tmp_path / ONNX_FILE)(IMAGES)
        assert (found - expected).abs().max() < 0.01 * expected.abs().max()
        assert optimized(tmp_path)["QLinearConv"] == int(narrow)


@pytest.mark.slow
def test_what_is_not_quantized_is_left_alone(tmp_path: Path) -> None:
    frozen = write(loaded(residual(), precisions=(8,), first_last="float"), 8, tmp_path)
    found = find_format("ort").load(tmp_path / ONNX_FILE)(IMAGES)
    with torch.no_grad():
        assert (found - frozen(IMAGES)).abs().amax(1).median() < 0.01 * found.abs().max()


@pytest.mark.slow
def test_weights_of_few_bits_use_whole_bytes(tmp_path: Path) -> None:
    given = loaded(plain(), precisions=(4,))
    frozen = write(given, 4, tmp_path)
    graph = onnx.load(str(tmp_path / ONNX_FILE)).graph
    filters = [t for t in graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4]
    stored = list(map(numpy_helper.to_array, filters))
    assert len(stored) == 3
    for weights in stored:
        peaks = np.abs(weights.reshape(len(weights), -1).astype(int)).max(1)
        assert ((peaks > 56) | (peaks == 0)).all()
    with torch.no_grad():
        expected = frozen(IMAGES)
    found = find_format("ort").load(tmp_path / ONNX_FILE)(IMAGES)
    assert (found - expected).abs().amax(1).median() < 0.02 * expected.abs().max()
