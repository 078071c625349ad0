"""`qadtr-brevitas export`: one folder, or one clear error and none."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qadtr_brevitas.attacks.lavan import Lavan
from qadtr_brevitas.cli.main import cli
from qadtr_brevitas.evaluation.craft import CraftSetup, craft
from qadtr_brevitas.evaluation.entries import load_models
from tests.evaluation.models import make_model_dir, train_split

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_model_dir(tmp_path_factory.mktemp("runs") / "net")
    judge, rest = train_split().divide(30, seed=0)
    search = Lavan(size=4, steps=1, batch_size=16)
    (subject,) = load_models([path])
    setup = CraftSetup(train=rest, held_out=judge, output=path / "patches")
    craft(subject, search, setup, name="lavan", targets=[0])
    return path


def export(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["export", *map(str, arguments)])


def test_a_folder_with_the_file_and_its_proof(run: Path, tmp_path: Path) -> None:
    result = export(run, "-p", 4, "-f", "qcdq", "--images", 10, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names > {"model.onnx", "export-report.json", "README.md", "run.py"}
    report = json.loads((tmp_path / "out" / "export-report.json").read_text())
    # The patch made at 4 bit, and not the one made at 32.
    assert [patch["name"] for patch in report["agreement"]["patches"]] == ["lavan-4x4-4bit-target0"]
    assert report["agreement"]["images"] == 10
    assert report["command"].startswith("qadtr-brevitas export")
    assert "accuracy (%)" in result.stdout
    assert "ASR of lavan-4x4-4bit-target0" in result.stdout
    assert f"wrote {tmp_path / 'out'}" in result.stderr


def test_json_and_no_verification(run: Path, tmp_path: Path) -> None:
    result = export(run, "-p", "w4a4", "-f", "qcdq", "--no-verify", "-o", tmp_path / "out", "--json")
    assert json.loads(result.stdout)["agreement"] is None
    again = export(run, "-p", 4, "-f", "qcdq", "--no-verify", "-o", tmp_path / "out")
    assert (again.exit_code, "is there already" in again.stderr) == (2, True)
    assert export(run, "-p", 4, "-f", "qcdq", "--no-verify", "-o", tmp_path / "out", "--overwrite").exit_code == 0


def test_only_what_an_export_wrote_is_replaced(run: Path, tmp_path: Path) -> None:
    arguments = [run, "-p", 4, "-f", "qcdq", "--no-verify", "--overwrite", "-o"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    for folder in (run, tmp_path / "other"):
        before = sorted(folder.rglob("*"))
        result = export(*arguments, folder)
        assert (result.exit_code, str(folder) in result.stderr) == (2, True)
        assert sorted(folder.rglob("*")) == before
    result = export(*arguments, tmp_path / "out")
    assert result.exit_code == 0, result.output
    (tmp_path / "out" / "notes.txt").touch()
    result = export(*arguments, tmp_path / "out")
    assert (result.exit_code, "notes.txt" in result.stderr) == (2, True)
    assert (tmp_path / "out" / "notes.txt").is_file()


def test_several_precisions_have_a_folder_each(tmp_path: Path) -> None:
    path, output = make_model_dir(tmp_path / "net", precisions=(8, 4)), tmp_path / "out"
    arguments = ["-p", 8, "-p", "w4a4", "-p", 4, "-f", "qcdq", "--no-verify", "-o", output]
    result = export(path, *arguments, "--json")
    assert [(found["precision"], found["output"]) for found in json.loads(result.stdout)] == [
        ("8", str(output / "8")),
        ("4", str(output / "4")),
    ]
    assert (output / "4" / "model.onnx").is_file()
    assert f"{output / '8'} is there already" in export(path, *arguments).stderr
    again = export(path, *arguments, "--overwrite")
    assert "Precisions side by side" in again.stdout
    # Weights at 4 bit take about half of those at 8, whatever the files take.
    eight, four = (json.loads((output / bits / "export-report.json").read_text()) for bits in ("8", "4"))
    assert four["weight_bytes"] < 0.7 * eight["weight_bytes"]
    assert f"{four['weight_bytes'] / 1e6:.3g}" in again.stdout
    assert four["bytes"] < eight["bytes"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["-p", "8", "-f", "qcdq"], 2, "no precision 8: it was converted for 32, 4"),
        (["-p", "32", "-f", "qcdq"], 2, "qcdq holds integers, and at 32 there are floats"),
        (["-p", "four", "-f", "qcdq"], 2, "four"),
        (["-p", "4", "-f", "onnx"], 2, "'onnx' is not one of"),
        (["-p", "4", "-p", "8", "-f", "qcdq"], 2, "no precision 8: it was converted for 32, 4"),
        (["-p", "4", "-f", "qcdq", "--no-verify", "--estimate"], 2, "estimates are FINN's, and the format is qcdq"),
        (["-p", "4", "-f", "finn", "--no-verify"], 1, "layer1.0"),
        (["-p", "4", "-f", "qcdq", "--no-verify", "--images", "100"], 2, "leave out --no-verify or --images"),
        (["-p", "4", "-f", "qcdq", "--certify-fill", "mean"], 2, "--certify-fill needs --defend"),
        (["-p", "4", "-f", "qcdq", "--no-verify", "-o", ".", "--overwrite"], 2, ". is not replaced"),
        (["-p", "4", "-f", "finn", "--board", "Pynq-Z7"], 2, "did you mean 'Pynq-Z2'"),
        (["-p", "4", "-f", "qcdq", "--board", "Pynq-Z1"], 2, "--board: the format qcdq is for no board"),
        (["-p", "4", "-f", "hls4ml", "--fps", "10"], 2, "--fps: the format hls4ml reads --part only"),
        (["-p", "4", "-f", "finn", "--part", "xc7z020clg400-1"], 2, "reads --board, --fps only"),
        (["-p", "4", "-f", "qcdq", "--batch", "many"], 2, "--batch is 'many'"),
        (["-p", "4", "-f", "finn", "--batch", "16"], 2, "stream one by one"),
        (["-p", "4", "-f", "qonnx", "--batch", "dynamic"], 2, "--batch dynamic: the tools that read qonnx"),
        (["-p", "4", "-f", "hls4ml", "--part", "no part"], 2, "'no part'"),
        (["-p", "4", "-f", "qcdq", "--data", "digits"], 1, "data set digits has 10 classes"),
        (["-p", "4", "-f", "qcdq", "--patches", "nowhere"], 2, "there are no patches at nowhere"),
    ],
)
def test_bad_usage(run: Path, tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    result = export(run, "-o", tmp_path / "out", *arguments)
    assert result.exit_code == code, result.output
    assert words in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_missing_library_is_named(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = export(run, "-p", 4, "-f", "qcdq", "--images", 5, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "export needs onnxruntime" in result.stderr
    assert "pip install 'qadtr-brevitas[export]'" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = export(run, "-p", 4, "-f", "qcdq", "--no-verify", "-o", tmp_path / "file" / "out")
    assert result.exit_code == 1
    assert "cannot write" in result.stderr
