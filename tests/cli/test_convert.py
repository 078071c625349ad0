from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qadtr_brevitas.checkpoint import load_model
from qadtr_brevitas.cli.main import cli
from qadtr_brevitas.precision import parse_precisions
from qadtr_brevitas.quant import allowed_precisions, get_precision

SMALL = ["data.dataset.train_images=40", "data.dataset.test_images=10", "quant.calibration.samples=20"]


def convert(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["convert", "cifar_resnet8", *map(str, arguments)])


def test_writes_a_calibrated_model_and_says_what_was_done(tmp_path: Path) -> None:
    output = tmp_path / "model"
    result = convert("--data", "shapes", *SMALL, "quant.precisions=[32,4]", "-o", output)
    assert result.exit_code == 0, result.output
    assert "stays float: a sum of quantized values" in result.stdout
    assert "residual stream, at least 8 bit" in result.stdout
    assert "of the parameters are quantized" in result.stdout
    assert f"wrote {output}; next: qadtr-brevitas attack {output} --data shapes" in result.stderr
    model, info = load_model(output)
    assert allowed_precisions(model) == parse_precisions([32, 4])
    assert get_precision(model).is_float
    assert info.source == "convert"
    thresholds = [p for name, p in model.named_parameters() if "thresholds" in name]
    assert thresholds
    assert all((p != 1).all() for p in thresholds)


def test_json_names_every_layer(tmp_path: Path) -> None:
    result = convert("--data", "shapes", *SMALL, "--dry-run", "--json", "-o", tmp_path / "model")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert {"conv1", "bn1", "act1", "avgpool", "linear"} <= {layer["name"] for layer in report["layers"]}
    assert report["output"] is None
    assert not (tmp_path / "model").exists()


def test_keeps_a_directory_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = convert("--data", "shapes", *SMALL, "-o", tmp_path)
    assert result.exit_code == 2
    assert "is there already: choose another folder with -o, or replace it with --overwrite" in result.stderr
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--data", "shapez"], 2, "did you mean 'shapes'?"),
        (["--data", "shapes", "quant.egde=same"], 2, "edge"),
        (["--data", "shapes", "quant.edge=4bit"], 2, "must be one of"),
        (["--data", "shapes", "train.epochs=3"], 2, "train.epochs=3 does not matter to a conversion"),
        (["--data", "shapes", "--checkpoint", "nowhere.safetensors"], 1, "nowhere.safetensors"),
        ([], 2, "--data"),
    ],
)
def test_bad_input(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    result = convert(*arguments, "-o", tmp_path / "model")
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert not (tmp_path / "model").exists()


def test_an_unknown_model_gets_the_nearest_names(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        cli, ["convert", "cifar_resnet21", "--data", "shapes", *SMALL, "-o", str(tmp_path / "m")]
    )
    assert result.exit_code == 2
    assert "cifar_resnet20" in result.stderr
