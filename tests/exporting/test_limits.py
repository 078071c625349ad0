"""What one FPGA compiler takes and the other does not, with the remedy; and what is rewritten so that they take it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional as F

from qadtr_brevitas.api.training import train
from qadtr_brevitas.cli.main import cli
from qadtr_brevitas.config import Recipe
from qadtr_brevitas.core.errors import ExportError
from qadtr_brevitas.core.precision import Precision
from qadtr_brevitas.exporting import check_for_target, export, find_format
from qadtr_brevitas.exporting.compilers import hls4ml_build
from qadtr_brevitas.exporting.tracing import KnownPools, exporter_errors
from qadtr_brevitas.models.cifar import BasicBlock
from qadtr_brevitas.pipeline.directories import ONNX_FILE
from tests.exporting.networks import SPLIT, head, loaded, stem
from tests.training.support import make_recipe

pytestmark = pytest.mark.slow

FOUR = Precision.parse(4)


def around(*middle: nn.Module, channels: int = 8) -> nn.Sequential:
    """A stem, what is on trial, and a head."""
    return nn.Sequential(*stem(8), *middle, *head(channels, nn.AdaptiveAvgPool2d(1)))


def conv(outputs: int = 8, kernel: int = 3, **geometry: object) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, outputs, kernel, **geometry), nn.ReLU())


class Dilated(nn.Module):
    """A convolution with holes, which hls4ml computes wrongly."""

    pretrained_cfg: ClassVar = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "architecture": "limits_dilated_net"}

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3, padding=2, dilation=2), nn.ReLU()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.act(self.conv(x))).flatten(1))


@register_model
def limits_dilated_net(pretrained: bool = False, num_classes: int = 3, **kwargs: object) -> Dilated:
    return Dilated(num_classes)


class Functional(nn.Module):
    """ReLU as a function in front of the average pool."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.conv(x)), 1).flatten(1))


class Tokens(nn.Module):
    """A mean over tokens, as in a transformer without a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.conv(x)).flatten(2).transpose(1, 2).mean(1))


def enlarged() -> nn.Module:
    """VGG on small images: an adaptive pool of one pixel to many."""
    return nn.Sequential(*stem(8), nn.MaxPool2d(16), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(72, 4))


class TwoHeads(nn.Module):
    """A flattened image that two linear layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(*stem(8), nn.MaxPool2d(4))
        self.left, self.right = nn.Linear(128, 4), nn.Linear(128, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).flatten(1)
        return self.left(x) + self.right(x)


def normalized() -> nn.Module:
    """A BatchNorm of the pixels of a flattened image."""
    return nn.Sequential(*stem(8), nn.MaxPool2d(4), nn.Flatten(), nn.BatchNorm1d(128), nn.Linear(128, 4))


REFUSED = {
    "relu as a function, finn": (Functional, "finn", r"the network itself: pools activations.*nn\.ReLU"),
    "depthwise with two outputs": (lambda: around(conv(16, groups=8), channels=16), "finn", r"3\.0: .*2 outputs"),
    "max pool with dilation": (lambda: around(nn.MaxPool2d(2, dilation=2)), "finn", "3: a max pool with dilation"),
    "max pool rounded up": (lambda: around(nn.MaxPool2d(3, 2, ceil_mode=True)), "finn", r"3: .*ceil_mode"),
    "one pixel made nine": (enlarged, "finn", r"4: Resize has no place.*use larger images"),
    "overlapping max pool": (lambda: around(nn.MaxPool2d(3, 2, 1)), "hls4ml", "3: a max pool with a stride other"),
    "dilated convolution": (lambda: around(conv(dilation=2)), "hls4ml", r"3\.0: a convolution with dilation"),
    "as many pixels as channels": (
        lambda: around(conv(groups=8, stride=2, padding=1)),
        "hls4ml",
        r"3\.0: a depthwise convolution of 8 channels to 8 pixels",
    ),
    "average divided by 3": (
        lambda: around(nn.AvgPool2d(2, divisor_override=3)),
        "hls4ml",
        r"3: an average that divides by 3,",
    ),
    "flattened image of two layers": (TwoHeads, "hls4ml", "several layers read a flattened image"),
    "norm of a flattened image": (normalized, "hls4ml", r"4: BatchNormalization on a flattened image"),
    "mean over tokens": (Tokens, "hls4ml", "the network itself: .*a mean that is no pooling"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_compiler_cannot_take_is_named_with_the_remedy(name: str, tmp_path: Path) -> None:
    make, form, words = REFUSED[name]
    given = loaded(make(), target=form)
    with pytest.raises(ExportError, match=words) as error:
        export(given, FOUR, find_format(form), tmp_path / "out", split=None)
    with pytest.raises(ExportError, match=words):
        check_for_target(given.model, form)
    # It was converted for the target: to do that again is no remedy.
    assert "--target" not in str(error.value)
    assert not list(tmp_path.iterdir())


TAKEN = {
    "relu as a function": (Functional, "hls4ml"),
    "no bias": (lambda: nn.Sequential(*stem(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4, False)), "finn"),
    "padding same": (lambda: around(conv(padding="same")), "finn"),
    "rounding up that changes nothing": (
        lambda: around(nn.MaxPool2d(2, ceil_mode=True), nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)),
        "hls4ml",
    ),
    "identity block behind the stem": (lambda: around(BasicBlock(8, 8, shortcut="B")), "hls4ml"),
    "average of 9 divided by 8": (lambda: around(nn.AvgPool2d(3, 2, 1, divisor_override=8)), "hls4ml"),
    "average divided by 3": (lambda: around(nn.AvgPool2d(2, divisor_override=3)), "finn"),
    "flattened image": (lambda: nn.Sequential(*stem(8), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(128, 4)), "hls4ml"),
}


@pytest.mark.filterwarnings("ignore:The GemmToMatMul transformation:UserWarning")
@pytest.mark.parametrize("name", TAKEN)
def test_what_is_rewritten_computes_the_same(name: str, tmp_path: Path) -> None:
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx

    make, form = TAKEN[name]
    given = loaded(make(), target=form)
    assert check_for_target(given.model, form)
    report = export(given, FOUR, find_format(form), tmp_path / "out", split=SPLIT)
    assert report.agreement is not None
    assert report.agreement.median_difference < 1e-4
    pixels, expected = (np.load(tmp_path / "out" / f"{name}.npy") for name in ("input", "expected_output"))
    if form == "hls4ml":
        # As hls4ml reads it.
        pixels = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
        model = hls4ml_build._channels_last(tmp_path / "out" / ONNX_FILE)
        assert "Transpose" not in {node.op_type for node in model.graph.node}
    else:
        model = ModelWrapper(str(tmp_path / "out" / ONNX_FILE))
    found = execute_onnx(model, {model.graph.input[0].name: pixels})[model.graph.output[0].name]
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: F.adaptive_avg_pool2d(x, (3, 4)),
        lambda x: F.adaptive_avg_pool2d(x, (10, 14)),
        lambda x: nn.AdaptiveAvgPool2d((None, 3))(x),
        lambda x: F.avg_pool2d(x, (2, 3), divisor_override=4),
        lambda x: F.avg_pool2d(x, 3, 1, 1, False, False, 5),
        lambda x: F.avg_pool2d(x, 2),
    ],
)
def test_pools_that_are_written_in_other_words_are_the_same(pool: object) -> None:
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    with KnownPools():
        found = pool(x)
    assert torch.allclose(found, pool(x), atol=1e-6)


def test_other_formats_take_an_adaptive_pool_to_any_size(tmp_path: Path) -> None:
    net = nn.Sequential(*stem(4), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(36, 4))
    report = export(
        loaded(net, precisions=(8,)), Precision.parse(8), find_format("qcdq"), tmp_path / "out", split=SPLIT
    )
    assert report.agreement is not None
    assert report.agreement.median_difference < 1e-4


def test_what_an_exporter_raises_is_one_line_with_the_layer() -> None:
    # As torch.onnx words it.
    text = (
        "Unsupported: ONNX export of operator frac, of 3.  [Caused by the value '11 defined in (%11 : Float) = "
        "aten::frac(%7), scope: FrozenModel::/VGG::net/Pool::net.features.avgpool # pool.py:3']\nInputs:\n  #0: 1"
    )
    with pytest.raises(ExportError) as found, exporter_errors():
        raise RuntimeError(text)
    assert str(found.value).startswith("features.avgpool cannot be written")
    assert "operator frac" in str(found.value)
    assert "\n" not in str(found.value)
    with pytest.raises(OSError, match="full"), exporter_errors():
        raise OSError("disk full")


def test_networks_for_no_compiler_are_not_checked() -> None:
    assert not check_for_target(loaded(Functional(), precisions=(8,)).model, None)


def test_training_for_a_compiler_is_refused_before_it_begins(tmp_path: Path) -> None:
    recipe = make_recipe(attack=None, regularizers=[], gradient=None, float_epochs=0)
    keys = recipe.model_dump(mode="json")
    keys["model"] = {"name": "limits_dilated_net"}
    keys["quant"]["target"] = "hls4ml"
    with pytest.raises(ExportError, match=r"hls4ml cannot take this network\. conv: a convolution with dilation"):
        train(Recipe.model_validate(keys), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_convert_refuses_what_the_export_would(tmp_path: Path) -> None:
    given = ["--target", "hls4ml", "model.args={}", "quant.precisions=[32,4]", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, ["convert", "resnet10t", "--dry-run", *given])
    assert result.exit_code == 1, result.output
    assert "maxpool: a max pool with a stride other" in result.stderr
