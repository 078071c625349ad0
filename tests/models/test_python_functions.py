"""Networks of the user's own code, by the name "package.module:function"."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from qadtr_brevitas.cli.main import cli
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.models.create import create_float_model
from qadtr_brevitas.models.python_functions import is_function_name
from qadtr_brevitas.pipeline.checkpoint import load_model, read_info

HERE = "tests.models.test_python_functions"


class Tiny(nn.Module):
    """A network without a configuration."""

    def __init__(self, num_classes: int = 10, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=2)
        self.act = nn.ReLU()
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv(x)).mean((2, 3)))


def seven_classes() -> nn.Module:
    return Tiny(7)


def not_a_network() -> int:
    return 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("my_models:make_net", True),
        ("a.b.c:Net", True),
        ("a.b:Factory.make", True),
        ("hf-hub:owner/name", False),
        ("hf_hub:owner", False),
        ("timm:resnet18", False),
        ("local-dir:folder", False),
        ("resnet50.a1_in1k", False),
    ],
)
def test_names_of_functions_are_told_from_those_of_timm(name: str, expected: bool) -> None:
    assert is_function_name(name) is expected


def test_arguments_are_passed_on() -> None:
    net = create_float_model(f"{HERE}:Tiny", num_classes=3, args={"width": 5})
    assert net(torch.rand(2, 3, 8, 8)).shape == (2, 3)
    assert net.conv.out_channels == 5  # pyright: ignore


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("no_such_package.nets:make", ["no_such_package", "imported"]),
        (f"{HERE}:Tyni", ["Tyni", "Tiny"]),
        (f"{HERE}:not_a_network", ["int", "torch.nn.Module"]),
        (f"{HERE}:HERE", ["str", "function"]),
    ],
)
def test_what_is_wrong_with_a_name_is_said(name: str, facts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        create_float_model(name, num_classes=3)
    assert all(fact in str(caught.value) for fact in facts), caught.value


def test_wrong_arguments_are_said() -> None:
    with pytest.raises(UsageError, match=r"depth.*model\.args"):
        create_float_model(f"{HERE}:Tiny", num_classes=3, args={"depth": 5})


def test_the_command_line_takes_the_name_and_the_folder_remembers_it(tmp_path: Path) -> None:
    output = tmp_path / "model"
    runner = CliRunner()
    result = runner.invoke(cli, ["convert", f"{HERE}:Tiny", "--calibrate", "digits", "-o", str(output)])
    assert result.exit_code == 0, result.output
    info = read_info(output)
    assert (info.name, info.num_classes, info.mean) == (f"{HERE}:Tiny", 10, (0.0, 0.0, 0.0))
    model, _ = load_model(output)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    result = runner.invoke(cli, ["evaluate", str(output), "--clean", "--images", "20", "-o", str(tmp_path / "report")])
    assert result.exit_code == 0, result.output


def test_a_network_of_other_classes_than_the_data_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        cli, ["convert", f"{HERE}:seven_classes", "--calibrate", "digits", "-o", str(tmp_path / "model")]
    )
    assert result.exit_code == 2
    assert "7" in result.output
    assert "10" in result.output


def test_the_size_of_images_has_to_be_known(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["convert", f"{HERE}:Tiny", "--dry-run"])
    assert result.exit_code == 2
    assert "data.dataset.image_size" in result.output
