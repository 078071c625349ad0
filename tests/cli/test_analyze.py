from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qadtr_brevitas.cli.main import cli
from tests.evaluation.models import make_model_dir

LAVAN = "attack={name: lavan, size: 4, steps: 1, batch_size: 16}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("runs") / "first")


def analyze(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["analyze", *map(str, arguments)])


@pytest.mark.slow
def test_an_analysis_prints_tables_and_names_its_files_and_the_next_command(model: Path) -> None:
    result = analyze("gradients", model, LAVAN, "pixel=fgsm", "--images", 6)
    assert result.exit_code == 0, result.output
    assert "Gradients: cosine" in result.stdout
    folder = model / "analysis" / "gradients"
    assert f"wrote analysis.json, records.csv, gradients.png, cosine.png to {folder}" in result.stderr
    assert f"next: qadtr-brevitas report {folder} -o report.html" in result.stderr
    content = json.loads((folder / "analysis.json").read_text())
    assert content["command"].startswith(f"qadtr-brevitas analyze gradients {model}")
    assert (content["data"]["images"], content["data"]["available"]) == (6, 30)


@pytest.mark.slow
def test_json_prints_the_analysis(model: Path, tmp_path: Path) -> None:
    result = analyze("size", model, LAVAN, "sizes=[3]", "targets=[0]", "--images", 6, "-o", tmp_path, "--json", "-q")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((tmp_path / "analysis.json").read_text())
    assert result.stderr == ""


@pytest.mark.slow
def test_an_unknown_analysis_is_refused_with_the_nearest_name(model: Path) -> None:
    result = analyze("gradient", model)
    assert result.exit_code == 2
    assert "did you mean 'gradients'?" in result.stderr


@pytest.mark.slow
def test_all_wrong_settings_are_reported_at_once(model: Path) -> None:
    result = analyze("features", model, "layer=conv1", "images=0")
    assert result.exit_code == 2
    assert "layer" in result.stderr
    assert "images" in result.stderr
    assert "did you mean 'layers'" in result.stderr


def test_settings_without_a_model_are_refused() -> None:
    result = analyze("size", "sizes=[3]")
    assert result.exit_code == 2
    assert "model or run directories" in result.stderr


@pytest.mark.slow
def test_an_unknown_layer_is_refused_with_the_nearest_name(model: Path) -> None:
    result = analyze("features", model, "layers=[conv2]")
    assert result.exit_code == 2
    assert "'conv2': did you mean" in result.stderr
