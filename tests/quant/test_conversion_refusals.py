"""What conversion refuses by name."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.quant import convert
from tests.quant.test_channels import Grey
from tests.quant.test_convert import Small


def test_a_network_with_nothing_to_quantize_is_refused() -> None:
    with pytest.raises(UsageError, match=r"Sequential.*nothing to quantize"):
        convert(nn.Sequential(nn.Flatten(), nn.ReLU()), image_size=(8, 8))


class Returning(nn.Module):
    """A network that returns what a function makes of its logits."""

    def __init__(self, output: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
        self.output = output

    def forward(self, x: Tensor) -> object:
        return self.output(self.net(x))


@pytest.mark.parametrize(
    ("output", "facts"),
    [
        (lambda y: (y, y), "Returning.*tuple.*logits"),
        (lambda y: {"logits": y}, "Returning.*dict.*logits"),
        (lambda y: y.mean(1), r"Returning.*\(2,\).*\(N, classes\)"),
    ],
)
def test_a_network_that_returns_no_logits_is_refused(output: Callable[[Tensor], object], facts: str) -> None:
    with pytest.raises(UsageError, match=facts):
        convert(Returning(output), image_size=(8, 8))


def test_a_network_without_parameters_is_refused() -> None:
    with pytest.raises(UsageError, match=r"Flatten has no parameters"):
        convert(nn.Flatten(), image_size=(8, 8))


def test_a_network_that_does_not_run_is_refused() -> None:
    with pytest.raises(UsageError, match="does not run on an image of 3x2x2"):
        convert(nn.Sequential(nn.Conv2d(3, 4, 5), nn.Flatten()), image_size=(2, 2))


def test_a_network_for_larger_images_says_so() -> None:
    net = timm.create_model("inception_v3", num_classes=3)
    with pytest.raises(UsageError, match=r"3x32x32.*3x299x299"):
        convert(net, image_size=(32, 32))


def test_impossible_precisions_are_refused() -> None:
    with pytest.raises(UsageError, match=r"w1a1.*not possible"):
        convert(Small(), [32, 1], image_size=(16, 16))
    with pytest.raises(UsageError, match="no precision given"):
        convert(Small(), [], image_size=(16, 16))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (lambda net: convert(net, [32, 4], image_size=(6, 6)), "SwitchableModel.*switchable model already.*32, 4"),
        (lambda net: nn.Sequential(convert(net, image_size=(6, 6))), "0 .*switchable model already"),
        (lambda net: convert(net, image_size=(6, 6)).net, "part of a switchable model"),
        (torch.jit.script, "scripted or traced"),
        (lambda net: torch.jit.trace(net, torch.rand(1, 3, 6, 6)), "scripted or traced"),
        (lambda net: nn.Sequential(torch.jit.script(net[0]), *net[1:]), "0 .*scripted"),
        (lambda net: net.half(), r"float16.*float\(\)"),
        (lambda net: net.bfloat16(), r"bfloat16.*float\(\)"),
        (lambda net: net.double(), r"float64.*float\(\)"),
    ],
)
def test_what_cannot_be_converted_is_named(change: Callable[[nn.Module], nn.Module], facts: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    with pytest.raises(UsageError, match=facts):
        convert(change(net), image_size=(6, 6))


@pytest.mark.parametrize(
    ("make", "facts"),
    [
        (lambda: timm.create_model("test_resnet", features_only=True), "FeatureListNet.*list.*features_only"),
        (lambda: timm.create_model("test_resnet", num_classes=0, global_pool=""), r"\(2, 96, 2, 2\).*\(N, classes\)"),
        (lambda: timm.create_model("test_resnet", num_classes=0), "num_classes=0"),
    ],
)
def test_networks_that_return_features_are_refused(make: Callable[[], nn.Module], facts: str) -> None:
    with pytest.raises(UsageError, match=facts):
        convert(make(), image_size=(64, 64))


def test_auxiliary_outputs_in_training_are_named() -> None:
    class Auxiliary(Grey):
        def forward(self, x: Tensor) -> Any:
            logits = super().forward(x)
            return (logits, logits) if self.training else logits

    model = convert(Auxiliary(1).eval(), [32, 4], image_size=(28, 28))
    model(torch.rand(1, 1, 28, 28))
    with pytest.raises(UsageError, match=r"tuple.*aux_logits=False"):
        model.train()(torch.rand(1, 1, 28, 28))
