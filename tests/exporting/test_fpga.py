"""Folders for FPGA compilers: exact, complete, and refused with the layers that are in the way."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from ruamel.yaml import YAML
from torch import Tensor, nn

from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.core.errors import ExportError, UsageError
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.exporting import BuildTarget, export, find_format
from qadtr_brevitas.exporting.ties import Ties, break_ties, check_ties, count_ties
from qadtr_brevitas.pipeline.directories import EXPORT_REPORT_FILE, ONNX_FILE
from qadtr_brevitas.quant import at_precision, calibrate, convert, freeze
from tests.exporting.networks import SPLIT, Mobile, head, images_of, loaded, plain, residual, stem

pytestmark = pytest.mark.slow
onnx = pytest.importorskip("onnx")

NETS = {"plain": plain, "residual": residual, "padded": lambda: residual("A"), "mobile": Mobile}
COMMON = {
    *(ONNX_FILE, EXPORT_REPORT_FILE, "README.md", "input.npy", "expected_output.npy"),
    *("labels.txt", "preprocess.json", "run.py", "quant_nodes.py", "test_vectors.npz"),
}


@pytest.mark.parametrize(("form", "bits"), [("finn", 4), ("hls4ml", 2)])
@pytest.mark.parametrize("name", NETS)
def test_the_file_computes_what_the_network_computes(name: str, form: str, bits: int, tmp_path: Path) -> None:
    given = loaded(NETS[name](), target=form)
    texture = torch.randint(256, (3, 5, 5), generator=torch.Generator().manual_seed(2)) / 255
    patch = Patch(texture=texture, mask=torch.ones(5, 5, dtype=torch.bool), place="random", meta={"target": 1})
    report = export(
        given, Precision.parse(bits), find_format(form), tmp_path / "out", split=SPLIT, patches=[("p", patch)]
    )
    assert f"not checked with {form} itself" in report.unchecked
    assert report.unchecked in (tmp_path / "out" / "README.md").read_text()
    assert report.agreement is not None
    moved = 0.0 if report.ties is None else report.ties.max_difference
    assert moved < 0.01 * report.agreement.largest_logit
    assert report.agreement.max_difference < moved + 1e-5
    assert report.agreement.median_difference < 1e-5
    assert {path.name for path in (tmp_path / "out").iterdir()} == COMMON | (
        {"dataflow_build_config.yaml", "specialize_layers.json"}
        if form == "finn"
        else {"hls4ml_config.json", "build.py"}
    )

    # Not by the code under test: the file, on images that it has not seen, against the switchable model.
    images = images_of((16, 16)).flip(3)
    with at_precision(given.model, bits), torch.no_grad():
        expected = given.model(images)
    exported = find_format(form).load(tmp_path / "out" / ONNX_FILE)(images)
    assert (exported - expected).abs().amax(1).median() < 1e-5
    assert (exported - expected).abs().max() < 0.01 * expected.abs().max()
    assert expected.std(0).min() > 1e-3
    nodes = onnx.load(str(tmp_path / "out" / ONNX_FILE)).graph.node
    found = {node.op_type for node in nodes}
    # hls4ml adds no bias to sums of weights with several steps.
    assert form == "finn" or all(len(node.input) == 2 for node in nodes if node.op_type == "Conv")
    assert not {"GlobalAveragePool", "AveragePool", "ReduceMean", "Slice", "Pad"} & found


def test_finn_takes_bytes_and_verifies_itself_with_an_image(tmp_path: Path) -> None:
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx

    given = loaded(residual(), target="finn")
    export(
        given,
        Precision.parse(4),
        find_format("finn"),
        tmp_path / "out",
        split=None,
        build=BuildTarget(board="ZCU104", fps=7),
    )
    model = ModelWrapper(str(tmp_path / "out" / ONNX_FILE))
    pixels, expected = (np.load(tmp_path / "out" / f"{name}.npy") for name in ("input", "expected_output"))
    assert np.array_equal(pixels, pixels.round())
    assert (pixels.min() >= 0, 200 < pixels.max() <= 255) == (True, True)
    assert str(model.get_tensor_datatype(model.graph.input[0].name)) == "UINT8"
    assert model.get_tensor_shape(model.graph.input[0].name) == [1, 3, 16, 16]
    found = execute_onnx(model, {model.graph.input[0].name: pixels})[model.graph.output[0].name]
    assert np.abs(found - expected).max() < 1e-5
    config = YAML(typ="safe").load(tmp_path / "out" / "dataflow_build_config.yaml")
    assert (config["board"], config["target_fps"]) == ("ZCU104", 7)


def test_residual_networks_have_steps_of_their_own(tmp_path: Path) -> None:
    for name, net in (("plain", plain()), ("residual", residual())):
        export(loaded(net, target="finn"), Precision.parse(4), find_format("finn"), tmp_path / name, split=None)
    plain_steps, residual_steps = (
        YAML(typ="safe").load(tmp_path / name / "dataflow_build_config.yaml")["steps"] for name in ("plain", "residual")
    )
    assert "step_streamline" in plain_steps
    assert any(step.endswith("step_resnet_streamline") for step in residual_steps)
    assert plain_steps[-1] == residual_steps[-1] == "step_generate_estimate_reports"


class Gated(nn.Module):
    """Squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.act = nn.ReLU()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.head = head(8, nn.AdaptiveAvgPool2d(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x))
        return self.head(x * self.gate(x))


class Joined(nn.Module):
    """Two branches that are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()) for _ in range(2))
        self.head = head(8, nn.AdaptiveAvgPool2d(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.left(x), self.right(x)], 1))


def grouped() -> nn.Module:
    return nn.Sequential(*stem(8), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), *head(8, nn.AdaptiveAvgPool2d(1)))


def smooth() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), *head(8, nn.AdaptiveAvgPool2d(1))
    )


def vanishing() -> nn.Module:
    small = [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*stem(8), nn.MaxPool2d(16), *small, *head(8, nn.AdaptiveAvgPool2d(1)))


def uneven() -> nn.Module:
    return nn.Sequential(*stem(8), nn.AvgPool2d(3, 2, 1, count_include_pad=False), *head(8, nn.AdaptiveAvgPool2d(1)))


def mirrored() -> nn.Module:
    return nn.Sequential(
        *stem(8), nn.ReflectionPad2d(1), nn.Conv2d(8, 8, 3), nn.ReLU(), *head(8, nn.AdaptiveAvgPool2d(1))
    )


def vit() -> nn.Module:
    args = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 4}
    return timm.create_model("vit_tiny_patch16_224", **args)


@pytest.mark.parametrize(
    ("net", "settings", "form", "words"),
    [
        (residual, {}, "finn", r"4, 5: adds activations that are not quantized.*convert MODEL --target finn"),
        (vit, {}, "finn", r"blocks\.0\.attn: Softmax has no place between integers"),
        (vit, {}, "hls4ml", r"blocks\.0\.attn.*: multiplies activations by activations"),
        (smooth, {"target": "finn"}, "finn", r"1: Mul of two activations, as in a gate, has no place|1: Sigmoid"),
        (Gated, {"target": "finn"}, "finn", r"gate\.2.*: Sigmoid has no place between integers"),
        (Joined, {"target": "finn"}, "finn", r"the network itself: Concat has no place between integers \(it joins"),
        (grouped, {"target": "finn"}, "finn", r"3: a convolution in groups that is not depthwise"),
        (vanishing, {"target": "finn"}, "finn", r"4: a kernel larger than 1x1 on an image of 1x1: use larger images"),
        (uneven, {"target": "finn"}, "finn", r"3: an average over fewer pixels at the border"),
        (mirrored, {"target": "finn"}, "finn", r"3: Pad has no place between integers \(it cuts pixels"),
        (plain, {"target": "finn"}, "hls4ml", r"0, .*: steps that are no powers of two.*--target hls4ml"),
        (plain, {"target": "hls4ml", "image_size": (12, 12)}, "hls4ml", r": an average over 9 pixels, no power of two"),
        (
            residual,
            {"first_last": "float"},
            "finn",
            r"0, .*: (computes on activations that are|its weights are) not quantized",
        ),
    ],
)
def test_what_is_in_the_way_is_named(
    net: object, settings: dict[str, object], form: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=rf"{form} cannot take this network\..*{words}"):
        export(loaded(net(), **settings), Precision.parse(4), find_format(form), tmp_path / "out", split=None)
    assert not list(tmp_path.iterdir())


def test_activations_of_more_bits_than_there_are_thresholds_for(tmp_path: Path) -> None:
    given = loaded(plain(), precisions=(10,), target="finn")
    with pytest.raises(ExportError, match=r"has 10 bits, more than the 8 that finn has room for"):
        export(given, Precision.parse(10), find_format("finn"), tmp_path / "out", split=None)


def test_ties_are_counted_where_steps_are_powers_of_two_and_one_quantizer_reads_another() -> None:
    learned, halves = (freeze(loaded(residual(), target=target).model, 4) for target in ("finn", "hls4ml"))
    images = images_of((16, 16))
    few, many = (count_ties(frozen, break_ties(frozen, images), SPLIT) for frozen in (learned, halves))
    assert few.values == many.values > 10_000
    assert few.ties < few.values // 1000
    assert many.ties > 10 * few.ties
    assert many.max_difference > 0
    assert few.images == 12


def in_doubles(frozen: nn.Module, images: Tensor) -> Tensor:
    """What exact arithmetic would give, to fifteen digits."""
    with torch.no_grad():
        return copy.deepcopy(frozen).double()(images.double()).float()


@pytest.mark.parametrize("mean", [(0.48, 0.46, 0.41), (0.5, 0.5, 0.5)])
def test_bytes_and_requantized_levels_halfway_between_two_levels_are_decided_alike_by_all_arithmetic(
    mean: tuple[float, ...],
) -> None:
    # Ranges to the largest value put bytes halfway; one quantizer has half the range of another that reads it.
    model = convert(residual().eval(), [32, 4], image_size=(16, 16), target="finn", mean=mean, std=(0.5,) * 3)
    images = torch.arange(256).repeat(9).view(3, 3, 16, 16) / 255
    calibrate(model, [images], method="minmax")
    frozen = freeze(model.eval(), 4)
    assert not torch.allclose(frozen(images), in_doubles(frozen, images), atol=1e-4)
    broken = break_ties(frozen, images)
    assert torch.allclose(broken(images), in_doubles(broken, images), atol=1e-4)
    ties = count_ties(frozen, broken, Split((images * 255).byte(), torch.zeros(3, dtype=torch.long), ("a", "b")))
    assert ties.ties > 0


def test_ties_that_change_classes_are_an_error() -> None:
    check_ties(Ties(images=12, values=100, ties=50, max_difference=1.0, same_class=11 / 12))
    # 1.4 % of 500 images may be 1 % of all, 3 % are more.
    check_ties(Ties(images=500, values=100, ties=50, max_difference=1.0, same_class=0.986))
    with pytest.raises(ExportError, match=r"97\.0% of 500 images"):
        check_ties(Ties(images=500, values=100, ties=50, max_difference=1.0, same_class=0.97))
    with pytest.raises(
        ExportError, match=r"FINN rounds values halfway.*50 of 100 here, and would give only 83\.3% of 12"
    ):
        check_ties(Ties(images=12, values=100, ties=50, max_difference=1.0, same_class=10 / 12))


def test_estimates_are_for_finn_and_need_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, four = loaded(plain(), target="finn"), Precision.parse(4)
    with pytest.raises(UsageError, match=r"FINN.*qonnx"):
        export(given, four, find_format("qonnx"), tmp_path / "out", split=None, with_estimate=True)
    monkeypatch.setenv("QADTR_BREVITAS_FINN", str(tmp_path / "nowhere"))
    with pytest.raises(
        UsageError, match=r"no Python of finn at .*nowhere: make it with `make compilers`.*BREVITAS_FINN"
    ):
        export(given, four, find_format("finn"), tmp_path / "out", split=None, with_estimate=True)
    assert not list(tmp_path.iterdir())
