"""The form that onnxruntime runs in integers: nothing between it and the network but rounding."""

from __future__ import annotations

import math
import platform
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from timm.layers import Attention
from torch import Tensor, nn

from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.exporting import find_format
from qadtr_brevitas.exporting.deployed import run
from qadtr_brevitas.exporting.fuse import Layer, make_room_for_bias
from qadtr_brevitas.models.cifar import PaddedShortcut
from qadtr_brevitas.pipeline.directories import ONNX_FILE
from qadtr_brevitas.quant import calibrate, freeze
from tests.exporting.networks import Mobile, branching, images_of, loaded, plain, residual, stem

IMAGES = images_of((16, 16))


def write(given: LoadedModel, bits: int, folder: Path) -> nn.Module:
    frozen = freeze(given.model, bits)
    find_format("ort").write(frozen, IMAGES[:1], folder / ONNX_FILE)
    return frozen


def optimized(folder: Path) -> Counter[str]:
    """What onnxruntime makes of the file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(str(folder / ONNX_FILE), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(str(folder / "optimized.onnx")).graph.node)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "integer_layers"),
    [(plain(), 3), (residual(), 6), (residual("A"), 6), (Mobile(), 8), (branching(), 7)],
    ids=["plain", "residual", "padded shortcut", "mobile", "branching"],
)
def test_at_8_bit_every_convolution_runs_in_integers(net: nn.Module, integer_layers: int, tmp_path: Path) -> None:
    frozen = write(loaded(net, target="ort", precisions=(8,)), 8, tmp_path)
    with torch.no_grad():
        expected = frozen(IMAGES)
    found = find_format("ort").load(tmp_path / ONNX_FILE)(IMAGES)
    assert (found - expected).abs().amax(1).median() < 0.01 * expected.abs().max()
    kinds = optimized(tmp_path)
    assert kinds["QLinearConv"] == integer_layers
    # Integers are pooled by another kernel.
    assert not {"BatchNormalization", "Conv", "FusedConv", "Add", "Gemm", "MaxPool"} & set(kinds)
    # The image and what averages give are quantized, and nothing is again.
    averages = kinds["GlobalAveragePool"] + kinds["AveragePool"] + kinds["ReduceMean"]
    assert kinds["QuantizeLinear"] <= 1 + averages
    counted = find_format("ort").count_integers(tmp_path / ONNX_FILE)
    # With the linear layer.
    assert (counted.integer, counted.layers, counted.kept) == (integer_layers + 1, integer_layers + 1, {})
    # A byte a weight: the former weights are gone, and nothing is stored that is not read.
    graph = onnx.load(str(tmp_path / ONNX_FILE)).graph
    assert {tensor.name for tensor in graph.initializer} <= {name for node in graph.node for name in node.input}
    stored = sum(math.prod(t.dims) for t in graph.initializer if t.data_type == onnx.TensorProto.INT8 and t.dims[1:])
    # A padded shortcut is a convolution in the file.
    shortcuts = sum(16 * 8 for module in frozen.modules() if isinstance(module, PaddedShortcut))
    weights = sum(module.weight.numel() for module in frozen.modules() if hasattr(module, "weight_quant"))
    assert stored == weights + shortcuts


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


def test_a_channel_whose_bias_exceeds_its_accumulator_keeps_no_other_from_integers(tmp_path: Path) -> None:
    net = nn.Sequential(*stem(8), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    given = loaded(net, precisions=(8,))
    with torch.no_grad():
        # A dead channel: its products add at most some millionths to a bias of 3.
        given.model.net[3].weight[2] *= 1e-9
        given.model.net[3].bias[2] = 3.0
        calibrate(given.model, [IMAGES])
        frozen = write(given, 8, tmp_path)
        expected = frozen(IMAGES)
    found = find_format("ort").load(tmp_path / ONNX_FILE)(IMAGES)
    assert (found - expected).abs().amax(1).median() < 0.01 * expected.abs().max()
    assert optimized(tmp_path)["QLinearConv"] == 2


def test_making_room_for_a_bias_moves_no_result_by_more_than_a_millionth_of_the_bias() -> None:
    random = np.random.default_rng(0)
    weights = random.integers(-127, 128, (4, 64)).astype(np.int8)
    steps, bias = np.array([1e-2, 1e-9, 1e-12, 1e-30]), np.array([1.0, -5.0, 3.0, 3.0])
    layer = Layer(weights.copy(), steps.copy(), bias.copy(), input_step=0.02)
    make_room_for_bias(layer)
    assert (np.abs(layer.bias / (layer.input_step * layer.steps)) <= 2**30 * 1.0001).all()
    given = random.integers(0, 256, (100, 64)) * 0.02
    exact, found = (given @ (w * s[:, None]).T + bias for w, s in ((weights, steps), (layer.weights, layer.steps)))
    assert (np.abs(exact - found) <= 64 * 255 / 2 / 2**30 * np.abs(bias) * 1.001 + 1e-12).all()
    assert np.array_equal(layer.weights[0], weights[0])


@pytest.mark.parametrize("pad", [(1, 1, 1, 1), (0, 1, 0, 1)])
def test_a_border_of_zeros_becomes_the_convolutions_own(pad: tuple[int, ...], tmp_path: Path) -> None:
    padded = [nn.ZeroPad2d(pad), nn.Conv2d(8, 8, 3, 2)]
    net = nn.Sequential(*stem(8), *padded, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    frozen = write(loaded(net, precisions=(8,)), 8, tmp_path)
    with torch.no_grad():
        expected = frozen(IMAGES)
    found = find_format("ort").load(tmp_path / ONNX_FILE)(IMAGES)
    assert (found - expected).abs().amax(1).median() < 0.01 * expected.abs().max()
    assert "Pad" not in {node.op_type for node in onnx.load(str(tmp_path / ONNX_FILE)).graph.node}
    assert optimized(tmp_path)["QLinearConv"] == 2


@pytest.mark.slow
def test_layers_that_stay_float_are_named_with_the_reason(tmp_path: Path) -> None:
    write(loaded(residual(), precisions=(8,)), 8, tmp_path)
    found = find_format("ort").count_integers(tmp_path / ONNX_FILE)
    assert found.layers == 7
    assert found.integer == found.layers - len(found.kept)
    assert set(found.kept) >= {"4.conv2", "5.conv2"}
    assert all("--target ort" in reason for name, reason in found.kept.items() if name.endswith("conv2"))


class Attending(nn.Module):
    """Patches as tokens, and a block of attention on them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 4)
        self.attention = Attention(16, num_heads=2, qkv_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        return self.head((tokens + self.attention(tokens)).mean(1))


@pytest.mark.slow
def test_all_products_of_attention_run_in_integers(tmp_path: Path) -> None:
    given = loaded(Attending(), target="ort", precisions=(8,))
    with torch.no_grad():
        given.model.net.attention.qkv.bias.normal_()
    frozen = write(given, 8, tmp_path)
    with torch.no_grad():
        expected = frozen(IMAGES)
    found = find_format("ort").load(tmp_path / ONNX_FILE)(IMAGES)
    assert (found - expected).abs().amax(1).median() < 0.01 * expected.abs().max()
    # embed, qkv, query times key, probabilities times value, proj, head; the factor before the softmax is in a step.
    counted = find_format("ort").count_integers(tmp_path / ONNX_FILE)
    assert (counted.integer, counted.kept) == (6, {})
    assert not {"Gemm", "MatMul", "FusedMatMul", "Mul"} & set(optimized(tmp_path))


@pytest.mark.slow
def test_what_is_not_quantized_is_left_alone(tmp_path: Path) -> None:
    frozen = write(loaded(residual(), precisions=(8,), first_last="float"), 8, tmp_path)
    found = find_format("ort").load(tmp_path / ONNX_FILE)(IMAGES)
    with torch.no_grad():
        assert (found - frozen(IMAGES)).abs().amax(1).median() < 0.01 * found.abs().max()


@pytest.mark.slow
def test_weights_of_few_bits_use_as_much_of_a_byte_as_cannot_saturate(tmp_path: Path) -> None:
    given = loaded(plain(), precisions=(4,))
    frozen = write(given, 4, tmp_path)
    graph = onnx.load(str(tmp_path / ONNX_FILE)).graph
    stored = map(numpy_helper.to_array, graph.initializer)
    filters = [weights for weights in stored if weights.ndim == 4 and weights.dtype != np.float32]
    assert {weights.dtype for weights in filters} == {np.dtype(np.int8)}
    peaks = [np.abs(weights.astype(int)).reshape(len(weights), -1).max(1) for weights in filters]
    # The first layer has 8 bit.
    assert sorted(peak.max() <= 64 for peak in peaks) == [False, True, True]
    for peak in peaks:
        low, high = (32, 64) if peak.max() <= 64 else (64, 127)
        assert (((peak >= low) & (peak <= high)) | (peak == 0)).all()
    # On x86 processors without VNNI, two such products are added in 16 bit.
    assert np.iinfo(np.int16).max >= 2 * 255 * 64
    with torch.no_grad():
        expected = frozen(IMAGES)
    found = find_format("ort").load(tmp_path / ONNX_FILE)(IMAGES)
    assert (found - expected).abs().amax(1).median() < 0.02 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only x86 processors saturate")
def test_onnxruntime_multiplies_without_saturating_where_it_is_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(loaded(plain(), target="ort", precisions=(8,)), 8, tmp_path)
    expected = find_format("ort").load(tmp_path / ONNX_FILE)(IMAGES)
    monkeypatch.setattr(run, "adds_exactly", lambda: False)
    options = run.session_options()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(tmp_path / ONNX_FILE), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(str(tmp_path / "optimized.onnx")).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    convolutions = [stored[node.input[3]] for node in graph.node if node.op_type == "QLinearConv"]
    # Its kernels for two unsigned bytes add in 32 bit.
    assert {weights.dtype for weights in convolutions if np.abs(weights.astype(int)).max() > 64} == {np.dtype(np.uint8)}
    torch.testing.assert_close(find_format("ort").load(tmp_path / ONNX_FILE)(IMAGES), expected, rtol=0, atol=1e-5)


def test_a_processor_that_does_not_tell_is_taken_to_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    def unread(path: Path, **options: object) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", unread)
    monkeypatch.setattr(platform, "machine", lambda: "AMD64")
    assert not run.adds_exactly()
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert run.adds_exactly()


@pytest.mark.parametrize(("flags", "exact"), [("sse4_2 avx2", False), ("avx2 avx_vnni", True), ("avx512_vnni", True)])
def test_processors_with_vnni_add_exactly(flags: str, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(Path, "read_text", lambda path, **options: f"flags\t: fpu {flags}\n")
    assert run.adds_exactly() == exact
