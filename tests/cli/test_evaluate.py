from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qadtr_brevitas.attacks.lavan import Lavan
from qadtr_brevitas.cli.main import cli
from qadtr_brevitas.craft import craft
from qadtr_brevitas.report import Report
from qadtr_brevitas.subjects import load_subjects
from tests.evaluation_models import make_model_dir, train_split


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    paths = [make_model_dir(folder / name, name=seed) for seed, name in enumerate(("first", "second"))]
    judge, rest = train_split().divide(30, seed=0)
    for subject, path in zip(load_subjects(paths), paths, strict=True):
        search = Lavan(size=4, steps=1, batch_size=16)
        craft(subject, search, name="lavan", train=rest, held_out=judge, output=path / "patches", targets=[0, 1])
    return paths


def evaluate(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["evaluate", *map(str, arguments)])


def test_one_model_gives_tables_and_files(runs: list[Path], tmp_path: Path) -> None:
    result = evaluate(runs[0], "-o", tmp_path)
    assert result.exit_code == 0, result.output
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"report.json", "report.md", "cells.csv", "asr.png", "patches.png", "examples-first.png", "cells"}
    for words in (
        "lavan 4x4: clean accuracy",
        "ASR white-box",
        "n of ASR",
        "white-box, each precision",
        "made at 32",
        "first to first",
    ):
        assert words in result.stdout
    assert (
        "wrote report.json, report.md, cells.csv, worst_case.csv, asr.png, patches.png, examples-first.png to "
        f"{tmp_path}" in result.stderr
    )
    assert "next: qadtr-brevitas evaluate" in result.stderr
    assert "![examples first](examples-first.png)" in (tmp_path / "report.md").read_text()


def test_two_models_are_compared_in_the_first_table(runs: list[Path], tmp_path: Path) -> None:
    result = evaluate(*runs, "-o", tmp_path, "-q")
    assert (result.exit_code, result.stderr) == (0, "")
    text = result.stdout
    assert text.index("first") < text.index("ASR white-box") < text.index("second")
    assert text.count("ASR white-box") == 2
    report = Report.model_validate_json((tmp_path / "report.json").read_bytes())
    assert [model.name for model in report.models] == ["first", "second"]
    assert len(report.cells) == 2 * 2 * (8 + 2)
    assert {cell.threat for cell in report.cells} == {"white-box", "transfer", "control"}


def test_json_is_the_report(runs: list[Path], tmp_path: Path) -> None:
    result = evaluate(runs[0], "-o", tmp_path, "--json", "--images", "9", "--precision", "4", "--seed", "3")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content == json.loads((tmp_path / "report.json").read_text())
    assert (content["data"]["images"], content["data"]["available"], content["seed"]) == (9, 30, 3)
    assert content["data"]["settings"]["image_size"] == 16
    assert content["command"].startswith(f"qadtr-brevitas evaluate {runs[0]} -o {tmp_path} --json --images 9")
    assert {cell["precision"] for cell in content["cells"]} == {"4"}


def test_killed_evaluation_goes_on(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import qadtr_brevitas.evaluate.jobs as module

    calls: list[int] = []
    predict = module.predict

    def counted(*arguments: object, **settings: object) -> object:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return predict(*arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "predict", counted)
    assert evaluate(runs[0], "-o", tmp_path).exit_code == 1
    assert len(list((tmp_path / "cells").iterdir())) == 5
    assert not (tmp_path / "report.json").exists()
    assert evaluate(runs[0], "-o", tmp_path).exit_code == 0
    assert len(calls) == 6 + 2 * (1 + 4 + 1) - 5


def test_patches_of_another_model_are_transferred(runs: list[Path], tmp_path: Path) -> None:
    file = runs[1] / "patches" / "lavan-4x4-4bit-target0.safetensors"
    result = evaluate(runs[0], "--patches", file, "-o", tmp_path, "--json")
    content = json.loads(result.stdout)
    assert {cell["threat"] for cell in content["cells"]} == {"transfer", "control"}
    assert [patch["file"] for patch in content["patches"]] == [str(file), None]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--precision", "8"], 2, "no precision 8: it was converted for 32, 4"),
        (["--images", "31"], 2, "31 images cannot be drawn from 30"),
        (["--patches", "nowhere"], 2, "there are no patches at nowhere"),
        (["--data", "digits"], 1, "data set digits has 10 classes and images of 32x32, model first is for 3 classes"),
    ],
)
def test_bad_usage(runs: list[Path], tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    result = evaluate(runs[0], "-o", tmp_path / "out", *arguments)
    assert result.exit_code == code, result.output
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_models_without_patches_or_without_a_place(runs: list[Path], tmp_path: Path) -> None:
    result = evaluate(make_model_dir(tmp_path / "bare"))
    assert result.exit_code == 2
    assert "make some with `qadtr-brevitas attack" in result.stderr
    (tmp_path / "bare" / "patches").mkdir()
    assert "there are no patches in" in evaluate(tmp_path / "bare").stderr
    missing = evaluate(tmp_path / "nowhere", "--data", "shapes")
    assert (missing.exit_code, "there is no model in" in missing.stderr) == (1, True)
    assert evaluate().exit_code == 2
    assert "is given twice" in evaluate(runs[0], runs[0]).stderr


def test_models_trained_on_different_data(runs: list[Path], tmp_path: Path) -> None:
    other = make_model_dir(tmp_path / "other")
    (other / "recipe.yaml").write_text("data:\n  dataset: digits\n")
    result = evaluate(runs[0], other)
    assert result.exit_code == 2
    assert "the models were trained on different data (shapes, digits): choose one with --data" in result.stderr


def test_patch_larger_than_the_images(runs: list[Path], tmp_path: Path) -> None:
    import torch

    from qadtr_brevitas.attacks.patch import Patch

    path = Patch(texture=torch.ones(3, 20, 20), mask=torch.ones(20, 20).bool()).save(tmp_path / "big")
    result = evaluate(runs[0], "--patches", path, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "patch 'big': a 20x20 patch is larger than the 16x16 image" in result.stderr


def test_patch_of_another_channel_count(runs: list[Path], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {"texture": torch.ones(1, 4, 4, dtype=torch.uint8), "mask": torch.ones(4, 4, dtype=torch.uint8)}
    header = {"format": "qadtr_brevitas.patch", "version": "1", "place": '"random"', "meta": "{}"}
    save_file(tensors, tmp_path / "gray.safetensors", metadata=header)
    result = evaluate(runs[0], "--patches", tmp_path, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "gray.safetensors" in result.stderr
    assert "give (3, h, w)" in result.stderr


def test_help() -> None:
    result = evaluate("--help")
    assert result.exit_code == 0
    for words in ("--patches", "--images", "Examples:", "MODEL_DIR..."):
        assert words in result.output
