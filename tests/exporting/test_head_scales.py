"""Networks with a range per attention head, as files."""

from pathlib import Path

import pytest
import torch

from qadtr_brevitas.exporting import find_format
from qadtr_brevitas.quant import calibrate, freeze
from tests.quant.test_attention_scales import IMAGES, converted, quantizers

pytest.importorskip("onnxruntime")
pytest.importorskip("qonnx")


@pytest.mark.parametrize("name", ["qcdq", "qonnx", "ort"])
def test_a_range_per_head_is_in_the_file(name: str, tmp_path: Path) -> None:
    model, form, path = converted(attention_scales="head"), find_format(name), tmp_path / "model.onnx"
    calibrate(model, IMAGES)
    frozen = freeze(model, 4)
    form.write(frozen, IMAGES[:1], path)
    expected = frozen(IMAGES).detach()
    # The fused file rounds biases to the accumulator.
    tolerance = 1e-5 if form.exact else 0.02
    assert float((form.load(path)(IMAGES) - expected).abs().max() / expected.abs().max()) <= tolerance


def test_steps_outside_are_those_that_stood_inside(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model, path = converted(attention_scales="head"), tmp_path / "model.onnx"
    calibrate(model, IMAGES)
    find_format("qcdq").write(freeze(model, 4), IMAGES[:1], path)
    graph = onnx.load(str(path)).graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    factors = {
        name: values[name] for node in graph.node if node.op_type == "Mul" for name in node.input if name in values
    }
    query = next(quantizer for name, quantizer in quantizers(model).items() if "query" in name)
    step = query.scale(4).detach().numpy()
    assert any(factor.shape == step.shape and (factor == step).all() for factor in factors.values())
    activations = [node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] not in values]
    assert activations
    assert all(torch.tensor(values[node.input[1]]).numel() == 1 for node in activations)
