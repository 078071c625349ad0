"""Exports: the file computes what the network computes, or nothing is kept."""

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from qadtr_brevitas.attacks.patch import Patch
from qadtr_brevitas.core.errors import ExportError, UsageError
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.data.split import Split
from qadtr_brevitas.evaluation.entries import LoadedModel
from qadtr_brevitas.exporting import export, find_format
from qadtr_brevitas.models.create import create_float_model
from qadtr_brevitas.pipeline.directories import ONNX_FILE
from qadtr_brevitas.quant import at_precision, calibrate, convert, freeze
from qadtr_brevitas.quant.model_info import ModelInfo
from qadtr_brevitas.quant.switchable_quant import has_ranges, quantizer_parameters

pytestmark = pytest.mark.slow

NETS = {
    "cnn": ("cifar_resnet8", {}),
    "vit": ("vit_tiny_patch16_224", {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)},
    ),
}
BUNDLE = {
    *("model.onnx", "export-report.json", "README.md", "labels.txt", "preprocess.json", "run.py", "test_vectors.npz"),
}
PRECISIONS = (32, 8, 4, 2, "w4a8", "w4a32")
IMAGES = torch.randint(256, (6, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
SPLIT = Split(IMAGES, torch.arange(6) % 4, ("a", "b", "c", "d"))


def loaded(name: str, **settings: object) -> LoadedModel:
    torch.manual_seed(0)
    architecture, args = NETS[name]
    net = create_float_model(architecture, num_classes=4, args=args).eval()
    model = convert(net, PRECISIONS, image_size=(16, 16), **settings)
    calibrate(model, [SPLIT.batch(torch.arange(6))[0]])
    info = ModelInfo(
        name=architecture,
        args=args,
        num_classes=4,
        image_size=(16, 16),
        classes=SPLIT.classes,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        quant={},
    )
    return LoadedModel(name, model.eval(), "fingerprint", info, path=f"models/{name}")


def patch(target: int | None = 1) -> Patch:
    texture = torch.randint(256, (3, 5, 5), generator=torch.Generator().manual_seed(2)) / 255
    return Patch(texture=texture, mask=torch.ones(5, 5, dtype=torch.bool), place="random", meta={"target": target})


@pytest.mark.parametrize(
    ("net", "form", "precision"),
    [
        ("cnn", "qonnx", "4"),
        ("cnn", "qonnx", "2"),
        ("cnn", "qonnx", "w4a8"),
        ("cnn", "qcdq", "8"),
        ("cnn", "qcdq", "2"),
        ("vit", "qonnx", "4"),
        ("vit", "qcdq", "8"),
        ("swin", "qcdq", "4"),
    ],
)
def test_the_file_computes_what_the_network_computes(net: str, form: str, precision: str, tmp_path: Path) -> None:
    given = loaded(net)
    wanted = Precision.parse(precision)
    report = export(
        given, wanted, find_format(form), tmp_path / "out", split=SPLIT, patches=[("p", patch()), ("q", patch(None))]
    )
    found = report.agreement
    assert found is not None
    assert found.images == 6
    assert found.median_difference < 1e-2 * found.largest_logit
    assert [p.target for p in found.patches] == [1, None]
    helpers = {"quant_nodes.py"} if form == "qonnx" else set()
    assert {path.name for path in (tmp_path / "out").iterdir()} == BUNDLE | helpers
    content = json.loads((tmp_path / "out" / "export-report.json").read_text())
    assert content["agreement"]["accuracy"] == found.accuracy
    assert (content["format"], content["precision"]) == (form, str(wanted))

    check_that_nothing_is_constant(tmp_path / "out" / ONNX_FILE)
    # Not by the code under test: the file, loaded again, against the switchable model.
    images = SPLIT.batch(torch.arange(6))[0]
    with at_precision(given.model, wanted), torch.no_grad():
        expected = given.model(images)
    exported = find_format(form).load(tmp_path / "out" / ONNX_FILE)(images)
    assert (exported - expected).abs().amax(1).median() < 1e-2 * expected.abs().max()


def check_that_nothing_is_constant(path: Path) -> None:
    """No node computes what is the same for every image, but for weights, which are stored as integers."""
    graph = onnx.load(str(path)).graph
    fixed = {tensor.name for tensor in graph.initializer}
    constant = [n for n in graph.node if n.op_type not in ("DequantizeLinear", "Quant") and fixed.issuperset(n.input)]
    assert not constant
    assert not {"Identity", "Shape", "ConstantOfShape"} & {node.op_type for node in graph.node}


class ReadsTwice(nn.Module):
    """Three nodes of it read one tensor twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(8, 4, 3), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        x = self.second(torch.cat([x, x], dim=1))
        return self.head(gelu(x * x, approximate="tanh").mean((2, 3)))


@pytest.mark.parametrize("form", ["qonnx", "qcdq"])
def test_nodes_that_read_one_tensor_twice(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = convert(ReadsTwice(), precisions=[4], image_size=(16, 16), mean=(0.0,) * 3, std=(1.0,) * 3)
    images = torch.rand(4, 3, 16, 16)
    calibrate(model, [images])
    frozen = freeze(model.eval(), 4)
    with torch.no_grad():
        find_format(form).write(frozen, images[:1], tmp_path / ONNX_FILE)
        expected = frozen(images)
    assert torch.allclose(find_format(form).load(tmp_path / ONNX_FILE)(images), expected, atol=1e-5)


def test_bit_widths_are_in_the_file(tmp_path: Path) -> None:
    export(loaded("cnn"), Precision.parse("w4a8"), find_format("qonnx"), tmp_path / "out", split=None)
    graph = onnx.load(str(tmp_path / "out" / ONNX_FILE)).graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    widths = [int(values[node.input[3]]) for node in graph.node if node.op_type == "Quant"]
    assert set(widths) == {4, 8}
    assert len(graph.input) == 1
    assert [dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim] == [1, 3, 16, 16]


class Wrong(nn.Module):
    """Another network than the one that was to be written."""

    def __init__(self, frozen: nn.Module) -> None:
        super().__init__()
        self.frozen = frozen

    def forward(self, images: Tensor) -> Tensor:
        return self.frozen(images * 0.7).roll(1, 1)


def test_a_file_that_computes_something_else_is_not_kept(tmp_path: Path) -> None:
    true = find_format("qcdq")
    lying = replace(
        true,
        name="lying",
        write=lambda frozen, image, path: true.write(Wrong(frozen), image, path),
        remedy="Give -f qcdq.",
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(
        ExportError,
        match=r"does not compute what the network computes .*same class.*kept\. Give -f qcdq\. To .*--no-verify",
    ):
        export(loaded("cnn"), Precision.parse(4), lying, tmp_path / "out", split=SPLIT)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]
    report = export(loaded("cnn"), Precision.parse(4), lying, tmp_path / "out", split=None)
    assert report.agreement is None


def test_a_model_that_was_never_calibrated_is_refused(tmp_path: Path) -> None:
    given = loaded("cnn")
    with torch.no_grad():
        for parameter in quantizer_parameters(given.model):
            parameter.fill_(1.0)
    with pytest.raises(UsageError, match=r"cnn was never calibrated.*convert models/cnn --calibrate"):
        export(given, Precision.parse(4), find_format("qcdq"), tmp_path / "out", split=None)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 196, 4))
    model = convert(net, PRECISIONS, image_size=(16, 16), mean=(0.0,) * 3, std=(1.0,) * 3)
    assert not has_ranges(model)
    calibrate(model, [SPLIT.batch(torch.arange(6))[0]])
    assert has_ranges(model)


@pytest.mark.parametrize("precision", ["32", "w4a32"])
def test_floats_are_refused(precision: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"qonnx holds integers, and at {precision} there are floats"):
        export(loaded("cnn"), Precision.parse(precision), find_format("qonnx"), tmp_path / "out", split=None)
    assert not list(tmp_path.iterdir())


def test_a_precision_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no precision 5"):
        export(loaded("cnn"), Precision.parse(5), find_format("qonnx"), tmp_path / "out", split=None)


def test_dynamic_ranges_are_refused(tmp_path: Path) -> None:
    dynamic = loaded("cnn", activations="dynamic")
    with pytest.raises(ExportError, match=r"ranges from each image, which qcdq has no word for.*without --dynamic"):
        export(dynamic, Precision.parse(8), find_format("qcdq"), tmp_path / "out", split=None)


def test_more_bits_than_a_format_has_room_for_are_refused(tmp_path: Path) -> None:
    narrow = replace(find_format("qcdq"), name="narrow", max_bits=4)
    with pytest.raises(ExportError, match=r"net\.conv1.* has 8 bits, more than the 4 that narrow has room for"):
        export(loaded("cnn"), Precision.parse(4), narrow, tmp_path / "out", split=None)


@pytest.mark.parametrize("name", ["qcdq", "qonnx", "ort"])
def test_clipped_features_are_exported(name: str, tmp_path: Path) -> None:
    model = loaded("cnn", feature_clip={"after": ["layer1", "layer2"], "percentile": 50})
    report = export(model, Precision(8, 8), find_format(name), tmp_path / name, split=SPLIT)
    assert report.agreement is not None


def test_compilers_refuse_clipped_features_by_name(tmp_path: Path) -> None:
    model = loaded("cnn", feature_clip=["layer1"])
    with pytest.raises(ExportError, match=r"norms of features after layer1"):
        export(model, Precision(8, 8), find_format("finn"), tmp_path / "finn", split=SPLIT)
